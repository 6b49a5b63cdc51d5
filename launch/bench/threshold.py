"""`tombola bench threshold`: choosing the largest scores against other ways of doing so."""

import contextlib
import ctypes
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.bench.measure import interleaved, report
from launch.bench.networks import DEFAULT, ROUNDS, Size, scores_of
from pruning.select import select_largest

Layers = dict[str, Tensor]
_OURS, _SORT = "select_largest", "sort (open_lth)"
_MOST_FOR_TORCH = 1 << 28  # topk and kthvalue take up to 24 bytes a score
_LEGEND = "kept minus asked for; peak of memory beyond scores and result"


def bench_threshold(*, size: Size | None = None, as_json: bool) -> None:
    """A model's real layers, with normal scores at each layer's own scale.

    Twice: of a dense network a fifth is kept; and a round of IMP, which of 64 % survivors keeps
    four fifths. The sort is open_lth's way: it compares with `>`, and so drops all ties.
    """
    result: dict[str, Any] = {"kept, extra": _LEGEND}
    for name in DEFAULT if size is None else (size,):
        scores = scores_of(name)
        total = sum(score.numel() for score in scores.values())
        for label, density, fraction in (("dense", 1.0, 0.2), ("of 64 %", 0.64, 0.8)):
            alive = _survivors(scores, density)
            count = round(sum(int(torch.count_nonzero(mask)) for mask in alive.values()) * fraction)
            work = f"{name} ({total / 1e6:.1f}M), {label}"
            result |= _compare(work, _ways(scores, alive, count, density), count, ROUNDS[name])
    if not as_json:
        result = {k: _line(v) if isinstance(v, dict) else v for k, v in result.items()}
    report(result, as_json=as_json)


def _survivors(scores: Layers, density: float) -> Layers:
    generator = torch.Generator(next(iter(scores.values())).device).manual_seed(1)
    masks = {}
    for name, score in scores.items():
        drawn = torch.empty(score.shape, dtype=torch.uint8, device=score.device)
        masks[name] = drawn.random_(0, 100, generator=generator) < 100 * density
    return masks


# The ways -------------------------------------------------------------------------------------


def _ways(
    scores: Layers, alive: Layers, count: int, density: float
) -> dict[str, Callable[[], Layers]]:
    ways = {
        _OURS: lambda: select_largest(scores, count, None if density == 1 else alive),
        _SORT: lambda: _by_sort(scores, alive, count),
    }
    if sum(score.numel() for score in scores.values()) < _MOST_FOR_TORCH:
        ways["torch.topk"] = lambda: _by_topk(scores, alive, count)
        ways["torch.kthvalue"] = lambda: _by_kthvalue(scores, alive, count)
    return ways


def _by_sort(scores: Layers, alive: Layers, count: int) -> Layers:
    """As open_lth does: NumPy sorts what survives; what is above the last pruned one is kept."""
    arrays = {name: score.cpu().numpy() for name, score in scores.items()}
    masks = {name: mask.cpu().numpy() for name, mask in alive.items()}
    ordered = np.sort(np.concatenate([array[masks[name]] for name, array in arrays.items()]))
    threshold = ordered[max(0, len(ordered) - count)]
    kept = {
        n: np.where(a > threshold, masks[n], np.zeros_like(masks[n])) for n, a in arrays.items()
    }
    return {name: torch.from_numpy(mask) for name, mask in kept.items()}


def _joined(scores: Layers, alive: Layers) -> Tensor:
    """All scores in one, those that are pruned below all others."""
    parts = [s.masked_fill(~alive[name], -1.0).flatten() for name, s in scores.items()]
    return torch.cat(parts)


def _by_topk(scores: Layers, alive: Layers, count: int) -> Layers:
    joined = _joined(scores, alive)
    chosen = torch.zeros(joined.shape, dtype=torch.bool, device=joined.device)
    chosen[joined.topk(count, sorted=False).indices] = True
    return _divided(chosen, scores)


def _by_kthvalue(scores: Layers, alive: Layers, count: int) -> Layers:
    joined = _joined(scores, alive)
    return _divided(joined >= joined.kthvalue(len(joined) - count + 1).values, scores)


def _divided(chosen: Tensor, scores: Layers) -> Layers:
    parts = chosen.split([score.numel() for score in scores.values()])
    return {n: p.view(s.shape) for (n, s), p in zip(scores.items(), parts, strict=True)}


# What they cost -------------------------------------------------------------------------------


def _compare(
    work: str, ways: dict[str, Callable[[], Layers]], count: int, rounds: int
) -> dict[str, Any]:
    seconds = dict(zip(ways, interleaved(*ways.values(), rounds=rounds), strict=True))
    found: dict[str, Any] = {}
    for name, way in ways.items():
        kept, extra = _kept_and_extra(way)
        entry = {
            "seconds": statistics.median(seconds[name]),
            "kept": kept - count,
            "extra MiB": None if extra is None else round(extra / 2**20, 1),
        }
        if name != _OURS:
            pairs = zip(seconds[name], seconds[_OURS], strict=True)
            entry["times select_largest"] = statistics.median(a / b for a, b in pairs)
        found[f"{work}: {name}"] = entry
    return found


def _line(entry: dict[str, Any]) -> str:
    extra = "unknown" if entry["extra MiB"] is None else f"{entry['extra MiB']:.1f} MiB"
    line = f"{entry['seconds']:.4g} s, kept {entry['kept']:+d}, extra {extra}"
    ratio = entry.get("times select_largest")
    return line if ratio is None else f"{line}, {ratio:.3g} times the time of {_OURS}"


def _kept_and_extra(way: Callable[[], Layers]) -> tuple[int, int | None]:
    """How many are kept, and the peak of memory beyond what was there and the result, in bytes."""
    _give_memory_back()
    before = _memory(peak=False)
    _forget_peak()
    masks = way()
    peak = _memory(peak=True)
    kept = sum(int(torch.count_nonzero(mask)) for mask in masks.values())
    result = sum(mask.numel() for mask in masks.values())
    return kept, None if before is None or peak is None else max(0, peak - before - result)


def _give_memory_back() -> None:
    """What was freed but kept for later use would hide what a way takes."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _memory(*, peak: bool) -> int | None:
    """Bytes on the GPU, or of this process (Linux); `None` elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
