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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a process takes whole files: the runs that a file's tests share are made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
