"""The same work as ours in the published designs of other projects, to be timed beside ours.

We wrote these scripts; they are not those projects' code. They do what each of its readers would
do: network, batches, rounds, rates and steps are those of the shipped configurations, read from
them, so that a ratio of seconds is one of designs. Each runs by itself:

    python -m launch.bench.peers.imp --levels 3
    python -m launch.bench.peers.scores --density 0.3
"""
