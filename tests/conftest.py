"""Makes the tests' own modules importable; one thread, since the tests share the machine.

On the CPU, also where there is a GPU: what they claim bit for bit holds there. What Hypothesis
tries is the same in each run, and may take its time; with `--hypothesis-profile search` it is new.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # before torch is loaded

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile("same")


_LONG = ("test_container.py", "test_demo.py", "test_cluster.py", "test_slurm.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few and long tests come first, so that no process waits for another's at the end."""
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a process takes whole files: the runs that a file's tests share are made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # in the order above, not by the number of tests
    return LoadFileScheduling(config, log)
