"""The number of ranks changes nothing but who does the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_ranks, tombola
from states import state_of
from tiny import TOML, facts, final_states, ticket_facts, write_config
from torch import nn

from data.loader import MemoryEvaluationSet
from train.engine import Engine
from train.evaluate import evaluate

GROUP_NORM = (
    TOML.replace("width = 4", 'width = 8\nnorm = "group"')
    .replace("rounds = 2", "rounds = 0")
    .replace("lr = 0.1", "lr = 0.005")
)
"""at a low rate: at a high one a ReLU that rounding has tipped over grows beyond any tolerance"""


def test_weights_agree_on_one_and_two_ranks(tmp_path: Path) -> None:
    """With a normalisation that does not depend on the batch, to 1e-5, after the same steps."""
    runs = []
    for world_size in (1, 2):
        root = tmp_path / str(world_size)
        root.mkdir()
        words = ["run", write_config(root, GROUP_NORM), "--root", str(root)]
        assert tombola(*words, world_size=world_size) == [0] * world_size
        runs.append(root / "tiny")
    one, two = (final_states(run)["imp/level-00/checkpoints"] for run in runs)
    for name, value in one.items():
        if name.startswith("model/"):
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    steps = [[(f["event"], f["level"], f["step"]) for f in facts(run)] for run in runs]
    assert steps[0] == steps[1]
    losses = [[f["loss"] for f in facts(run) if f["event"] == "train"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_torchrun_runs_the_same_command(tmp_path: Path) -> None:
    """`torchrun --nproc-per-node 2 -m launch run CONFIG`: the same steps of the same size."""
    words = ["-m", "launch", "run", write_config(tmp_path), "--root", str(tmp_path)]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *words, "--stages.imp.rounds", "1"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("imp/level-01: density 59.99%") == 1
    found = facts(tmp_path / "tiny")
    assert max(fact["step"] for fact in found) == 39
    assert ticket_facts(tmp_path / "tiny").keys() == {
        "imp/level-00",
        "imp/level-01",
        "imp/level-01-random",
    }


def evaluated(folder: str) -> None:
    """Writes what each rank makes of an evaluation of 103 images."""
    engine = Engine()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(103, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 10, (103,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    share = MemoryEvaluationSet(
        images, labels, batch_size=8, rank=engine.rank, world_size=engine.world_size
    )
    result = evaluate(model, share, engine)
    logits = model(images)
    right = int((logits.argmax(1) == labels).sum())
    among = int((logits.topk(5, 1).indices == labels[:, None]).sum())
    assert result.accuracy == right / 103
    assert result.top5 == among / 103
    assert abs(result.loss - float(nn.functional.cross_entropy(logits, labels))) < 1e-6
    Path(folder, f"{engine.world_size}.{engine.rank}").write_text(repr(result.accuracy))
    engine.close()


def test_evaluation_counts_every_image_once(tmp_path: Path) -> None:
    """103 images on 1, 2 and 3 ranks: the same accuracy, on each of them."""
    for world_size in (1, 2, 3):
        assert run_ranks(world_size, evaluated, str(tmp_path)) == [0] * world_size
    results = [path.read_text() for path in tmp_path.iterdir()]
    assert len(results) == 6
    assert len(set(results)) == 1


def with_masks_that_differ(words: list[str], output: str) -> None:
    """A run in which rank 1 comes to another mask than rank 0."""
    from processes import command

    from pruning import imp
    from pruning.masks import Masks

    prune = imp.prune_fraction

    def other_mask(*arguments: object) -> Masks:
        masks = prune(*arguments)  # type: ignore[arg-type]
        if os.environ["RANK"] == "1":
            name = next(iter(masks))
            masks = Masks({**masks, name: ~masks[name]})
        return masks

    imp.prune_fraction = other_mask  # type: ignore[assignment]
    command(words, output)


def test_masks_that_differ_between_ranks_stop_the_run(tmp_path: Path) -> None:
    """One line on each rank's stderr, exit code 1, before a step is taken with them."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    assert run_ranks(2, with_masks_that_differ, words, str(tmp_path / "out")) == [1, 1]
    printed = (tmp_path / "out.0").read_text()
    assert "error: the masks of imp/level-01 differ between the ranks (rank 0: " in printed
    assert not (tmp_path / "tiny/imp/level-01").exists()
    assert (tmp_path / "tiny/imp/level-00/ticket.json").exists()


def failing_main(folder: str) -> None:
    engine = Engine()

    def fail() -> None:
        raise ValueError("only rank 0 ran this")

    try:
        engine.on_main(fail)
    except ValueError as error:
        Path(folder, str(engine.rank)).write_text(str(error))
    engine.close()


def test_an_error_of_rank_0_is_raised_on_every_rank(tmp_path: Path) -> None:
    """... so that no rank waits for one that is gone."""
    assert run_ranks(2, failing_main, str(tmp_path)) == [0, 0]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"only rank 0 ran this"}


def accumulated(folder: str, micro_batch: int | None) -> None:
    """Writes the gradient of one step of 50 images on unequal shares, in micro-batches."""
    from data.loader import Batch
    from train.objective import Objective

    engine = Engine(micro_batch=micro_batch)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 10, (50,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    network = engine.prepare(model, images[:2])
    share = slice(
        50 * engine.rank // engine.world_size, 50 * (engine.rank + 1) // engine.world_size
    )
    batch = Batch(images[share], labels[share])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = engine.backward(
        state_of(engine, network, optimizer, batch_size=50), batch, Objective(10)
    )
    gradient = network.module[1].weight.grad  # type: ignore[index]
    total = engine.reduce(loss)
    torch.save(
        {"gradient": gradient, "loss": total},
        Path(folder, f"{engine.world_size}.{engine.rank}.{micro_batch}"),
    )
    engine.close()


def test_the_gradient_is_that_of_the_global_batch(tmp_path: Path) -> None:
    """Unequal shares (50 images on 3 ranks) and micro-batches of 4 weigh every image alike."""
    for world_size, micro_batch in ((1, None), (1, 7), (2, 4), (3, None), (3, 4)):
        codes = run_ranks(world_size, accumulated, str(tmp_path), micro_batch)
        assert codes == [0] * world_size
    results = [torch.load(path, weights_only=True) for path in sorted(tmp_path.iterdir())]
    assert len(results) == 10
    for result in results[1:]:
        torch.testing.assert_close(result["gradient"], results[0]["gradient"], rtol=0, atol=1e-7)
        torch.testing.assert_close(result["loss"], results[0]["loss"], rtol=0, atol=1e-6)
