"""Where images are, in which order they come, and how they become batches.

What every source shares: `order` (samples and random draws as pure functions of a seed), `loader`
(the seam to training), `config`, `sources` (opens what a configuration names), `record` (what a
run's data are), `files` (local disks and object stores), `workers`, `errors`.

In memory: `arrays` reads digits, CIFAR and idx files; `augment` varies them on the device.

Image files, in the order of their way: `layout` finds them, `scan` and `shards` look into them,
`cataloguing` makes a `catalogue`; from that `stream` plans batches, with `windows` and `replacing`,
`encoded` gives their bytes, `pipeline` has DALI decode them; where it cannot, `blame` finds why.

Commands: `verify` and `inspection`; `pack`, `pack_plan` and `pack_shard`.
"""
