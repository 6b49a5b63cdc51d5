"""Gradients on several ranks: summed without what masks prune, to the same bits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks, tombola
from test_dynamic_runs import BASE, GMP, RIGL, SET
from test_multiprize_runs import BASE as PRIZE_BASE
from test_multiprize_runs import PRIZE
from tiny import TOML, final_states, write_config
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pruning.masks import Masks, prunable
from train.engine import Engine
from train.reduction import Reduction


class Branches(nn.Module):
    """Convolutions in both memory formats, a bias, a normalisation, and a weight that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.second = nn.Conv2d(16, 32, 3, bias=False)
        self.frozen = nn.Conv2d(32, 32, 1, bias=False).requires_grad_(False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = self.frozen(torch.relu(self.second(y)))
        out: Tensor = self.head(y.mean((2, 3)))
        return out


def drawn(model: nn.Module, density: float, seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    weights = {n: w for n, w in prunable(model).items() if w.requires_grad}
    return Masks(
        {n: torch.rand(w.shape, generator=generator) < density for n, w in weights.items()}
    )


class Sums:
    """What is sent, and what plain DDP makes of the same backward passes."""

    def __init__(self, world_size: int, *, channels_last: bool = False, **options: Any) -> None:
        self.engine, self.world_size = Engine(), world_size
        form = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.model = Branches().to(memory_format=form)  # type: ignore[call-overload]
        self.plain = Branches().to(memory_format=form)  # type: ignore[call-overload]
        self.plain.load_state_dict(self.model.state_dict())
        settings: dict[str, Any] = {"bucket_cap_mb": 0.01, "gradient_as_bucket_view": True}
        self.reference = DistributedDataParallel(self.plain, **settings)
        self.wrapped = DistributedDataParallel(self.model, **settings)
        self.reduction = Reduction(self.model, **options)
        self.wrapped.register_comm_hook(self.reduction, Reduction.sum)
        self.sent: list[tuple[int, torch.dtype]] = []

    def step(self, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradients by name: ours, and those of plain DDP, as sums. Two micro-batches."""
        generator = torch.Generator().manual_seed(100 * seed + self.engine.rank)
        images = torch.randn(2, 4, 3, 8, 8, generator=generator)
        found = []
        for wrapped, scale in ((self.reference, self.world_size), (self.wrapped, 1)):
            wrapped.zero_grad(set_to_none=True)
            reduce, self.sent = dist.all_reduce, []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "all_reduce", self._noted(reduce))
                with wrapped.no_sync():
                    (wrapped(images[0]).square().mean() * scale).backward()
                (wrapped(images[1]).square().mean() * scale).backward()
            named = wrapped.module.named_parameters()
            found.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        return found[1], found[0]

    def _noted(self, reduce: Any) -> Any:
        def noted(tensor: Tensor, **options: Any) -> Any:
            self.sent.append((tensor.numel(), tensor.dtype))
            return reduce(tensor, **options)

        return noted

    @property
    def num_sent(self) -> int:
        return sum(count for count, _ in self.sent)


def assert_kept_and_zero(
    ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    """Bit-equal where it is kept, exactly zero where it is pruned."""
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        expected = gradient * masks[name] if name in masks else gradient
        assert torch.equal(ours[name], expected), name
        assert bool(gradient.any())


def packed_sums(world_size: int, channels_last: bool) -> None:
    sums = Sums(world_size, channels_last=channels_last)
    masks = drawn(sums.model, 0.1)
    dense = sum(p.numel() for p in sums.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for n, p in sums.model.named_parameters() if n not in masks)
    frozen = sums.model.frozen.weight.numel()
    sums.reduction.need(masks)
    for seed in range(4):  # DDP makes other buckets after the first
        assert_kept_and_zero(*sums.step(seed), masks)
        assert sums.num_sent == masks.kept + everything - frozen
    assert len(sums.sent) > 1, "one bucket: nothing was rebuilt"
    others = drawn(sums.model, 0.2, seed=1)
    sums.reduction.need(others)
    assert_kept_and_zero(*sums.step(7), others)
    sums.reduction.need({})
    assert_kept_and_zero(*sums.step(8), {})
    assert sums.num_sent == dense
    named = sums.model.named_parameters()
    sums.reduction.need({n: torch.zeros_like(p, dtype=torch.bool) for n, p in named})
    ours, _ = sums.step(9)
    assert sums.num_sent == 0
    assert not any(bool(gradient.any()) for gradient in ours.values())
    sums.engine.close()


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_are_those_of_ddp_where_masks_keep(channels_last: bool) -> None:
    """And only these are sent, in all buckets, accumulated, under other masks, and under none."""
    assert run_ranks(2, packed_sums, 2, channels_last) == [0, 0]


def chosen_buckets() -> None:
    """A large layer that stays dense fills its bucket; the others are packed all the same."""
    sums = Sums(2)
    sparse = drawn(sums.model, 0.1)
    masks = {**sparse, "second.weight": torch.ones_like(sparse["second.weight"])}
    sums.reduction.need(masks)
    for seed in range(3):
        ours, plain = sums.step(seed)
    counts = [count for count, _ in sums.sent]
    sizes = {n: p.numel() for n, p in sums.model.named_parameters() if p.requires_grad}
    assert max(counts) >= sizes["second.weight"]
    assert sums.num_sent < sum(sizes.values())
    for name in ("second.weight", "norm.weight"):
        assert torch.equal(ours[name], plain[name])
    kept = masks["first.weight"]
    assert torch.equal(ours["first.weight"][kept], plain["first.weight"][kept])
    never = Reduction(sums.model, pack_below=0.0)
    never.need(sparse)
    assert never._find_places(list(sums.model.parameters())) is None
    sums.engine.close()


def test_a_dense_bucket_stays_dense() -> None:
    """Each bucket by its own share; none where `pack_below` is 0."""
    assert run_ranks(2, chosen_buckets) == [0, 0]


def rounded_sums() -> None:
    sums = Sums(2, reduce_dtype="bf16")
    masks = drawn(sums.model, 0.1)
    sums.reduction.need(masks)
    for seed in range(3):
        ours, plain = sums.step(seed)
        for name, gradient in plain.items():
            expected = gradient * masks[name] if name in masks else gradient
            scale = float(gradient.abs().max())
            torch.testing.assert_close(ours[name], expected, rtol=0.02, atol=0.02 * scale)
        assert any(not torch.equal(ours[name], plain[name]) for name in plain if name not in masks)
    assert {dtype for _, dtype in sums.sent} == {torch.bfloat16}
    sums.engine.close()


def test_bf16_halves_what_is_sent() -> None:
    """Packed or not, gradients come close to those of fp32."""
    assert run_ranks(2, rounded_sums) == [0, 0]


RUNS = {
    "imp": TOML,
    "set": BASE + SET,
    "rigl": BASE + RIGL,
    "gmp": BASE + GMP,
    "dual": BASE + '[[stages]]\nname = "dual"\nrecipe = "dual"\ndensity = 0.2\n',
    "clipped": TOML.replace("[optimizer]", "clip = 0.5\n[optimizer]"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    """On two ranks, packed wherever anything is pruned, and never packed."""
    states = []
    for share in ("0", "1"):
        root = tmp_path / share
        root.mkdir()
        words = ["run", write_config(root, RUNS[name]), "--root", str(root)]
        assert tombola(*words, "--train.pack_below", share, world_size=2) == [0, 0]
        states.append(final_states(root / "tiny"))
    never, always = states
    assert never.keys() == always.keys()
    for level, tensors in never.items():
        different = [n for n, value in tensors.items() if not torch.equal(always[level][n], value)]
        assert not different, (level, different[:3])


def with_counts(words: list[str], folder: str) -> None:
    """A run that writes down how many numbers each all-reduce of gradients had."""
    from launch.cli import run_command

    counts: list[int] = []
    original = Reduction.sum

    def noted(self: Reduction, bucket: dist.GradBucket) -> Future[Tensor]:
        places = self._places_in(bucket)
        counts.append(bucket.buffer().numel() if places is None else len(places))
        return original(self, bucket)

    Reduction.sum = noted  # type: ignore[method-assign]
    assert run_command(words) == 0
    Path(folder, f"{dist.get_rank() if dist.is_initialized() else 0}.json").write_text(
        json.dumps(counts)
    )


def counted(folder: Path, text: str) -> list[int]:
    words = ["run", write_config(folder, text), "--root", str(folder)]
    assert run_ranks(2, with_counts, words, str(folder)) == [0, 0]
    found: list[int] = json.loads((folder / "0.json").read_text())
    return found


def test_rigl_sends_all_gradients_only_where_it_rewires(tmp_path: Path) -> None:
    """Every fourth step below the end of rewiring; the other steps are packed."""
    counts = counted(tmp_path, BASE + RIGL)[2:]  # after the two passes that settle the buckets
    dense = [step for step, count in enumerate(counts) if count == max(counts)]
    assert dense == [4, 8, 12, 16], counts
    packed = {count for step, count in enumerate(counts) if step not in dense}
    assert max(packed) < 0.4 * max(counts)


def test_random_weights_of_multi_prize_tickets_are_not_sent(tmp_path: Path) -> None:
    """Nor have they gradients or optimizer state: of each layer the scores alone."""
    counts = counted(tmp_path, PRIZE_BASE + PRIZE)
    states = final_states(tmp_path / "tiny")
    (state,) = states.values()
    trained = {n: v for n, v in state.items() if n.startswith("optimizer/state/")}
    assert trained
    assert not [name for name in state if name.endswith((".random", ".binary"))]
    moved = sum(v.numel() for n, v in trained.items() if n.endswith(("momentum_buffer", "exp_avg")))
    assert set(counts) == {moved}


def prepared(folder: str) -> None:
    """A network with something on each rank that is in no state dict, before DDP has it."""
    engine = Engine()
    model = nn.Linear(2, 1)
    model.register_buffer("own", torch.full((1,), float(engine.rank)), persistent=False)
    engine.prepare(model, torch.zeros(2, 2))
    Path(folder, f"{engine.rank}.json").write_text(json.dumps(model.own.tolist()))  # type: ignore[operator, union-attr]
    engine.close()


def test_what_each_rank_makes_for_itself_is_not_sent(tmp_path: Path) -> None:
    """As the random weights of multi-prize tickets: not even once."""
    assert run_ranks(2, prepared, str(tmp_path)) == [0, 0]
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(2)] == ["[0.0]", "[1.0]"]
