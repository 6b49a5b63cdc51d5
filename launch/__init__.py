"""The command, configuration files, recipes, reports and benchmarks."""

import os

# An agent that restarts workers must not hand them the store of the dead ones (torch reads this
# when it sets up the rendezvous); see docs/clusters for what happens otherwise.
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
