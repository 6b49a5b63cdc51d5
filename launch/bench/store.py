"""`tombola bench store`: bytes and seconds of stored masks against other ways of keeping them."""

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data.files import Folder
from launch.bench.measure import interleaved, median_ratio, report
from launch.bench.networks import DEFAULT, ROUNDS, Size, scores_of
from pruning.mask_store import StoredMasks, read_masks, write_masks
from pruning.masks import Masks
from pruning.objects import Objects
from pruning.select import select_largest

DENSITIES = (0.8, 0.2, 0.05, 0.02)
_TIMED = 0.2


def bench_store(*, size: Size | None = None, as_json: bool) -> None:
    """Masks of a network's real layers: the largest of normal scores at each layer's own scale.

    On one core, in the folder for temporary files, every file written through to the disk.
    References: a dict of int32 tensors by `torch.save`, which is open_lth's way, and one of bool
    tensors. The entropy bound is that of each layer's density.
    """
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, _one_core():
        for name in DEFAULT if size is None else (size,):
            scores = scores_of(name)
            total = sum(score.numel() for score in scores.values())
            for density in DENSITIES:
                masks = Masks(select_largest(scores, round(density * total)))
                work = f"{name} ({total / 1e6:.1f}M), {density:.0%}"
                result[work] = _bytes(masks, Path(folder))
                if density == _TIMED:
                    result[work] |= _seconds(masks, Path(folder), ROUNDS[name])
    report(result, as_json=as_json)


def entropy_bytes(masks: Masks) -> float:
    """What no code can go below that knows the density of each layer and nothing else."""
    bits = 0.0
    for row in masks.table():
        for share in (row.density, 1 - row.density):
            bits -= row.size * share * math.log2(share) if share else 0.0
    return bits / 8


def stored_bytes(stored: StoredMasks) -> int:
    """The bytes of the objects."""
    return sum(shard.num_bytes for shard in stored.shards)


def _bytes(masks: Masks, folder: Path) -> dict[str, Any]:
    num_bytes = stored_bytes(write_masks(Objects(Folder(folder / "objects")), masks))
    return {
        "bytes": num_bytes,
        "of the entropy bound": num_bytes / entropy_bytes(masks),
        "of packed bits": 8 * num_bytes / masks.size,
        "of int32": num_bytes / (4 * masks.size),
    }


def _seconds(masks: Masks, folder: Path, rounds: int) -> dict[str, Any]:
    objects = Objects(Folder(folder / "objects"))
    stored = write_masks(objects, masks)
    int32, as_bool = folder / "int32.pt", folder / "bool.pt"

    def write() -> None:
        for shard in stored.shards:
            (folder / f"objects/{shard.sha256}.safetensors").unlink()
        write_masks(objects, masks)

    saves: tuple[Callable[[], object], ...] = (
        write,
        lambda: _torch_save({n: mask.int() for n, mask in masks.items()}, int32),
        lambda: _torch_save(dict(masks), as_bool),
    )
    loads: tuple[Callable[[], object], ...] = (
        lambda: read_masks(objects, stored),
        lambda: {n: mask.bool() for n, mask in torch.load(int32, weights_only=True).items()},
        lambda: torch.load(as_bool, weights_only=True),
    )
    found = _codec(masks, rounds)
    for verb, ways in (("write", saves), ("read", loads)):
        ours, theirs, plain = interleaved(*ways, rounds=rounds)
        found |= {
            f"{verb} s": statistics.median(ours),
            f"{verb}: int32 / ours": median_ratio(theirs, ours),
            f"{verb}: bool / ours": median_ratio(plain, ours),
        }
    return found


def _codec(masks: Masks, rounds: int) -> dict[str, float]:
    """Weights a second of CPU time, to and from objects in memory: the best of all rounds.

    Neighbours on the machine only add to CPU time.
    """
    objects = Objects(Folder("memory://bench-store/objects"))
    encode, decode = [], []
    for _ in range(rounds):
        began = time.process_time()
        stored = write_masks(objects, masks)
        written = time.process_time()
        read_masks(objects, stored)
        encode.append(written - began)
        decode.append(time.process_time() - written)
        objects.folder.remove()
    return {
        "encode GB/s": masks.size / min(encode) / 1e9,
        "decode GB/s": masks.size / min(decode) / 1e9,
    }


def _torch_save(value: object, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
