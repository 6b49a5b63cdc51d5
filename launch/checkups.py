"""What this machine can do for a run, each thing tried, and how what would fail is mended.

Whatever can be tried is tried, not looked up: an all-reduce, an image decoded by DALI, a function
compiled, a file written and locked.
"""

import contextlib
import io
import os
import platform
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from data.errors import UserError
from data.files import Folder
from data.inspection import decode_with_dali
from data.pipeline import is_installed, require_dali
from data.workers import num_cpus
from launch.locks import unit_lock
from train.compiling import compile_in_place
from train.versions import software_versions

State = Literal["ok", "note", "fails"]
_PROBE = 32 << 20
"""bytes that are written and read on a disk; of a store, a sixteenth"""
_LITTLE_SPACE = 10 << 30
_LITTLE_SHARED = 1 << 30
_FEW_FILES = 4096
_EXTRAS = {
    "dali": ("nvidia.dali", "image files"),
    "onnx": ("onnx", "tombola export --format onnx"),
    "s3": ("s3fs", "s3:// folders"),
    "gs": ("gcsfs", "gs:// folders"),
    "tensorboard": ("tensorboard", "log.trackers"),
    "mlflow": ("mlflow", "log.trackers"),
    "wandb": ("wandb", "log.trackers"),
}


@dataclass(frozen=True)
class Finding:
    """What was found of one thing that runs may need."""

    what: str
    state: State
    found: str
    remedy: str = ""
    """how it is mended, or done without"""


def examine(root: str) -> Iterator[Finding]:
    """Each thing in turn; `root` is where runs would be."""
    checks: dict[str, Callable[[], Finding]] = {
        "software": _software,
        "cores and memory": _cores,
        "GPUs": _gpus,
        "bf16": _bf16,
        "gloo": _gloo,
        "NCCL": _nccl,
        "network": _network,
        "DALI": _dali,
        "torch.compile": _compiler,
        "shared memory": _shared_memory,
        "open files": _open_files,
        "runs": lambda: _runs(root),
        "packages": _packages,
    }
    for what, check in checks.items():
        try:
            yield check()
        except Exception as error:  # whatever it is, the other things are still worth knowing
            reason = str(error).partition("\n")[0][:200]
            yield Finding(what, "fails", f"{type(error).__name__}: {reason}", "see the message")


# The machine -----------------------------------------------------------------------------


def _software() -> Finding:
    versions = software_versions()
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    missing = [name for name, version in versions.items() if version == "not installed"]
    if missing:
        return Finding("software", "fails", found, f"pip install {' '.join(missing)}")
    return Finding("software", "ok", found)


def _cores() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{num_cpus()} of {os.cpu_count()} cores, {_bytes(memory.available)} of "
    found += f"{_bytes(memory.total)} free, {platform.machine()} {platform.system()}"
    return Finding("cores and memory", "ok", found)


def _gpus() -> Finding:
    if torch.cuda.is_available():
        found = ", ".join(
            f"{torch.cuda.get_device_name(i)} "
            f"({_bytes(torch.cuda.get_device_properties(i).total_memory)})"
            for i in range(torch.cuda.device_count())
        )
        return Finding("GPUs", "ok", f"{found}; CUDA {torch.version.cuda}")
    if os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi"):
        wanted = torch.version.cuda or "none, it is built for the CPU"
        found = f"a driver that torch cannot use (its CUDA: {wanted})"
        remedy = "update the driver, or install a torch for its CUDA (pytorch.org)"
        return Finding("GPUs", "fails", found, remedy)
    remedy = "trainings run on the CPU: enough for digits, not for ImageNet"
    return Finding("GPUs", "note", "none", remedy)


def _bf16() -> Finding:
    if not torch.cuda.is_available():
        return Finding("bf16", "ok", "computed on the CPU, where it may be slower than fp32")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("bf16", "ok", "native")
    remedy = "set train.precision = 'fp16'"
    return Finding("bf16", "note", "not in this GPU's hardware", remedy)


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding(
            "shared memory", "note", "no /dev/shm", "NCCL and DALI want it: --shm-size 8g"
        )
    if free < _LITTLE_SHARED:
        remedy = "NCCL may fail with several GPUs: docker run --shm-size 8g"
        return Finding("shared memory", "note", f"{_bytes(free)} free", remedy)
    return Finding("shared memory", "ok", f"{_bytes(free)} free")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FEW_FILES:
        remedy = f"large data sets may need more: ulimit -n {min(max(hard, soft), 65536)}"
        return Finding("open files", "note", f"{soft} at once", remedy)
    return Finding("open files", "ok", f"{soft} at once")


# The ranks -------------------------------------------------------------------------------


def _gloo() -> Finding:
    return _all_reduced("gloo", torch.ones(4))


def _nccl() -> Finding:
    if not torch.cuda.is_available():
        return Finding("NCCL", "note", "not tried: no GPU", "ranks on CPUs use gloo")
    return _all_reduced("nccl", torch.ones(4, device="cuda"))


def _all_reduced(backend: str, values: torch.Tensor) -> Finding:
    """One rank's all-reduce: a library that is missing or broken shows itself."""
    what = "NCCL" if backend == "nccl" else backend
    if dist.is_initialized():
        return Finding(what, "note", "not tried: this process is a rank", "run it without torchrun")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(values)
        total = float(values.sum())
    finally:
        dist.destroy_process_group()
    if total != len(values):
        return Finding(what, "fails", f"an all-reduce gave {total:g}", "install torch anew")
    return Finding(what, "ok", "an all-reduce of one rank went well")


def _network() -> Finding:
    addresses = [
        f"{name} {address.address}"
        for name, found in psutil.net_if_addrs().items()
        for address in found
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    if not addresses:
        return Finding("network", "note", "loopback alone", "enough for one machine")
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:
        own = "nothing"
    found = f"{', '.join(addresses)}; {name} is {own}"
    if own == "nothing" or own.startswith("127."):
        remedy = "for several nodes use tombola launch, or set GLOO_SOCKET_IFNAME"
        return Finding("network", "note", found, remedy)
    return Finding("network", "ok", found)


# What runs are made with -----------------------------------------------------------------


def _dali() -> Finding:
    try:
        require_dali()
    except UserError:
        remedy = "image files are read through it: pip install 'tombola[dali]'"
        return Finding("DALI", "note", "not installed", remedy)
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 32)).save(jpeg, "JPEG")
    (reason,) = decode_with_dali([jpeg.getvalue()])
    if reason:
        remedy = "install the DALI that fits this machine's CUDA: pip install 'tombola[dali]'"
        return Finding("DALI", "fails", reason, remedy)
    return Finding("DALI", "ok", "a JPEG was decoded on the CPU")


def _compiler() -> Finding:
    model = nn.Linear(4, 2).to("cuda" if torch.cuda.is_available() else "cpu")
    compile_in_place(model)
    started = time.perf_counter()
    try:
        model(torch.zeros(2, 4, device=next(model.parameters()).device))
    except Exception as error:
        reason = str(error).partition("\n")[0][:160]
        remedy = "install a C++ compiler (apt-get install g++), or leave train.compile = false"
        return Finding("torch.compile", "note", reason, remedy)
    return Finding("torch.compile", "ok", f"a function took {time.perf_counter() - started:.1f} s")


def _runs(root: str) -> Finding:
    """Writes, reads and locks where runs would be, and leaves nothing there."""
    folder = Folder(root)
    was_there = folder.local_path is None or folder.local_path.exists()
    try:
        return _tried(folder, folder / f".doctor-{uuid.uuid4().hex}")
    except OSError as error:
        remedy = "make it writable, or choose another --root"
        return Finding("runs", "fails", f"{root}: {error.strerror or error}", remedy)
    finally:
        if not was_there and folder.local_path is not None:
            with contextlib.suppress(OSError):  # not made, or used by others by now
                folder.local_path.rmdir()


def _tried(folder: Folder, probe: Folder) -> Finding:
    content = os.urandom(_PROBE // (1 if folder.is_local else 16))
    try:
        started = time.perf_counter()
        probe.write("content", content)
        seconds = time.perf_counter() - started
        is_same = probe.read("content") == content
        with unit_lock(probe, "doctor") as is_locked:
            pass
    finally:
        probe.remove()
    if not is_same:
        remedy = "choose another --root"
        return Finding("runs", "fails", f"{folder}: gives back other bytes", remedy)
    found = f"{folder}: {len(content) / seconds / 1e6:,.0f} MB/s written durably"
    if folder.local_path is None:
        return Finding("runs", "note", found, "no locks there: start no run twice at once")
    free = shutil.disk_usage(folder.local_path).free
    found += f", {_bytes(free)} free"
    if not is_locked:
        remedy = "no locks: start nothing twice there, or mount it with them (Lustre: -o flock)"
        return Finding("runs", "note", found, remedy)
    if free < _LITTLE_SPACE:
        remedy = "a checkpoint of ResNet-50 takes 0.2 GB, and a level keeps several"
        return Finding("runs", "note", found, remedy)
    return Finding("runs", "ok", f"{found}, locks work")


def _packages() -> Finding:
    missing = {name: use for name, (module, use) in _EXTRAS.items() if not is_installed(module)}
    if not missing:
        return Finding("packages", "ok", "all optional ones are installed")
    found = "without " + ", ".join(f"{name} ({use})" for name, use in missing.items())
    return Finding("packages", "note", found, f"pip install 'tombola[{','.join(missing)}]'")


def _bytes(count: int) -> str:
    return f"{count / (1 << 30):,.1f} GiB"
