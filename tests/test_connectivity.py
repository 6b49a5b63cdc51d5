"""Linear mode connectivity: errors on the line, batch normalisation, the recipe, the report."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family import BASE, DEEPER, IMP, Mistake, assert_refused, run
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import assert_same_run, facts, ticket_facts, write_config
from torch import Tensor, nn

from data.errors import RunError
from data.files import Folder
from launch.cli import run_command
from launch.config import read_config
from launch.report import open_stage
from launch.run import make_engine
from pruning.connectivity import (
    Connectivity,
    Curve,
    Line,
    all_results,
    find_result,
    measure,
    recalibrate,
)
from pruning.tickets import Ticket
from train.progress import Display
from train.session import Session

STABLE = """
[[stages]]
name = "stable"
recipe = "connectivity"
ticket = "imp"
levels = [0, 2]
points = 5
num_batches = 2
"""
LINE = """
[[stages]]
name = "imp-20"
recipe = "imp"
rounds = 1
rewind = "5it"
model.name = "cifar_resnet20"

[[stages]]
name = "line"
recipe = "connectivity"
ticket = "deeper"
other = "imp-20"
other_levels = [1]
points = 3
num_batches = 2
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("connectivity")
    return run(folder, BASE + IMP + STABLE + DEEPER + LINE)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Of the digits, with batches of 96, on one rank."""
    stage = read_config(write_config(tmp_path, BASE + IMP)).stages[0]
    engine = make_engine(stage)
    return open_stage(stage, engine, Folder(tmp_path / "run"), Display(shown=False))


# ---- the measure


def test_the_barrier_is_the_peak_less_the_mean_of_the_ends() -> None:
    """Not less than zero: an end may be the peak."""
    assert Curve((0.1, 0.35, 0.2)).barrier == pytest.approx(0.2)
    assert Curve((0.1, 0.05, 0.1)).barrier == pytest.approx(0.0)
    assert Curve((0.3, 0.1, 0.1)).barrier == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("errors", "stable"), [((0.0, 0.019, 0.0), True), ((0.0, 0.02, 0.0), False)]
)
def test_stable_is_a_barrier_below_two_percent(errors: Any, stable: bool) -> None:
    """... on every data set."""
    curves = {"train": Curve((0.0, 0.0)), "test": Curve(errors)}
    assert Connectivity("s", "level-00", "a", "b", 1.0, "none", curves).is_connected is stable


class Threshold(nn.Module):
    """Says class 0 where `weight` is below a half, class 1 otherwise, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        scores = torch.zeros(len(images), 10, device=images.device)
        scores[:, 0] = 0.5 - self.weight
        scores[:, 1] = self.weight - 0.5
        return scores


def test_errors_are_measured_from_the_first_network_to_the_second(session: Session) -> None:
    """At five points, on all training and test images: class 0 before the middle, 1 after it."""
    ends = [{"weight": torch.tensor(value)} for value in (0.1, 0.8)]
    curves = measure(session, Threshold(), *ends, Line(points=5), what="line")
    labels = {"train": labels_of(session, "train"), "test": labels_of(session, "test")}
    for split, curve in curves.items():
        zero, one = (1 - float((labels[split] == label).float().mean()) for label in (0, 1))
        assert curve.errors == pytest.approx((zero, zero, zero, one, one))


def labels_of(session: Session, split: str) -> Tensor:
    images = session.data.training_images() if split == "train" else session.data.evaluation[split]
    return torch.cat([batch.labels for batch in images])


def test_training_images_are_shown_as_in_an_evaluation(session: Session) -> None:
    """Each once, not augmented, in their order; or that many, evenly spread."""
    everything = torch.cat([batch.images for batch in session.data.training_images()])
    fifth = session.data.training_images(len(everything) // 5)
    some = torch.cat([batch.images for batch in fifth])
    spread = np.arange(len(some)) * len(everything) // len(some)
    assert fifth.num_samples == len(some) == len(everything) // 5
    assert torch.equal(some, everything[spread])
    assert session.data.training_images(10**9).num_samples == len(everything)
    loader = session.data.loader(0)
    assert len(everything) // 96 == loader.steps_per_epoch


def test_statistics_are_recalibrated_as_means_over_training_batches(session: Session) -> None:
    """Against the first batches of the stream, normalised by hand; the rest of the state stays."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    model[0].running_mean.fill_(7.0)  # type: ignore[operator, union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(session, model, 3)
    loader = iter(session.data.loader(session.seed("connectivity", "batchnorm")))
    batches = [next(loader).images for _ in range(3)]
    mean = torch.stack([batch.mean() for batch in batches]).mean()
    var = torch.stack([batch.var() for batch in batches]).mean()
    torch.testing.assert_close(model[0].running_mean, mean[None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].running_var, var[None], rtol=1e-4, atol=1e-6)
    assert torch.equal(model[2].weight, before["2.weight"])
    assert model[0].momentum == 0.1


def test_interpolated_statistics_are_those_of_the_line(session: Session) -> None:
    """... and what was done is said."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    other = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    other[0].running_mean.fill_(2.0)  # type: ignore[operator, union-attr]
    seen: list[float] = []
    model.register_forward_hook(lambda *_: seen.append(float(model[0].running_mean)))  # type: ignore[arg-type]
    line = Line(points=3, batchnorm="interpolate")
    measure(session, model, model.state_dict(), other.state_dict(), line, what="line")
    assert sorted(set(seen)) == [0.0, 1.0, 2.0]
    assert line.treatment(model) == "statistics interpolated"
    assert Line(num_batches=4).treatment(model) == ("statistics recalibrated on 4 training batches")
    assert line.treatment(nn.Sequential(nn.GroupNorm(1, 2))) == "none in the network"


# ---- the recipe


def test_two_copies_differ_in_noise_alone(finished: Path) -> None:
    """Both start from the masks and W_k of the ticket, with a fresh optimizer, on other orders."""
    tickets = ticket_facts(finished)
    for level in ("level-00", "level-02"):
        source = Ticket.load(finished / f"imp/{level}")
        copies = [Ticket.load(finished / f"stable/{level}-copy-{n}") for n in (1, 2)]
        for copy in copies:
            assert copy.masks.digest() == source.masks.digest()
            assert copy.weights_digest == source.weights_digest
            assert tickets[f"stable/{level}-copy-1"]["parent"] == source.id
        losses = [
            [
                f["loss"]
                for f in facts(finished)
                if f["level"] == f"{level}-copy-{n}" and "loss" in f
            ]
            for n in (1, 2)
        ]
        assert losses[0] != losses[1]


def test_the_ends_of_the_line_are_what_was_trained(finished: Path) -> None:
    """With interpolated statistics the ends have exactly the copies' test errors."""
    words = ["report", "--barrier", f"{finished}/stable/level-02-copy-1"]
    words += [f"{finished}/stable/level-02-copy-2", "--batchnorm", "interpolate", "--points", "3"]
    document = json_of(words)
    errors = document[0]["curves"]["test"]
    copies = [Ticket.load(finished / f"stable/level-02-copy-{n}") for n in (1, 2)]
    accuracies = [copy.metrics["test"]["accuracy"] for copy in copies]
    assert [errors[0], errors[-1]] == pytest.approx([1 - a for a in accuracies], abs=1e-9)
    assert document[0]["same_start"] is True
    assert document[0]["batchnorm"] == "statistics interpolated"


def json_of(words: list[str]) -> Any:
    """What a command prints with --json, and nothing else."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_command([*words, "--json"]) == 0
    return json.loads(printed.getvalue())


def test_every_level_has_its_result(finished: Path) -> None:
    """Kept in its folder, and among the metrics, for training and test images."""
    results = {f"{r.stage}/{r.name}": r for r in all_results(Folder(finished))}
    assert results.keys() == {"stable/level-00", "stable/level-02", "line/level-02"}
    for place, result in results.items():
        assert result.curves.keys() == {"train", "test"}
        points = 3 if place.startswith("line") else 5
        assert all(len(curve.errors) == points for curve in result.curves.values())
        assert result.batchnorm == "statistics recalibrated on 2 training batches"
    recorded = [f for f in facts(finished) if f["event"] == "connectivity"]
    assert len(recorded) == 6
    for fact in recorded:
        curve = results[f"{fact['stage']}/{fact['level']}"].curves[fact["split"]]
        assert fact["barrier"] == curve.barrier
        assert tuple(fact["errors"]) == curve.errors


def test_two_tickets_of_one_network_are_compared_without_training(finished: Path) -> None:
    """The elastic ticket and IMP's own, at levels that are named."""
    (result,) = [r for r in all_results(Folder(finished)) if r.stage == "line"]
    assert (result.first, result.second) == ("deeper/level-02", "imp-20/level-01")
    assert result.density == Ticket.load(finished / "deeper/level-02").density
    assert not list((finished / "line").glob("*/checkpoints"))


def test_a_finished_run_does_nothing_and_prints_the_same(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = facts(finished)
    root = finished.parent
    assert run_command(["run", str(root / "tiny.toml"), "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    assert facts(finished) == before
    assert "stable: error on the line" in printed
    assert "BatchNorm: statistics recalibrated on 2 training batches" in " ".join(printed.split())
    assert (finished / "connectivity.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(folder, BASE + IMP + STABLE)


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("two levels", 4),
        ("a line, at a point of it", 7),
        ("a line, before its result", 1),
        ("a line, after its result", 1),
    ],
)
def test_a_run_killed_in(point: str, count: int, uninterrupted: Path, tmp_path: Path) -> None:
    """... goes on with the same command to the same lines, facts and tickets."""
    words = ["run", write_config(tmp_path, BASE + IMP + STABLE), "--root", str(tmp_path)]
    assert run_ranks(1, killed_run, words, point, count) == [KILLED]
    assert tombola(*words) == [0]
    assert_same_run(tmp_path / "tiny", uninterrupted)
    assert all_results(Folder(tmp_path / "tiny")) == all_results(Folder(uninterrupted))


def test_the_ranks_measure_together(finished: Path, tmp_path: Path) -> None:
    """With interpolated statistics two ranks find the errors of one."""
    text = (
        BASE
        + LINE.replace('"deeper"', f'"{finished}/deeper"')
        .replace('other = "imp-20"', f'other = "{finished}/imp-20"\nbatchnorm = "interpolate"')
        .partition("model.name")[2]
        .partition("\n")[2]
    )
    found = []
    for world_size in (1, 2):
        root = tmp_path / str(world_size)
        root.mkdir()
        words = ["run", write_config(root, text), "--root", str(root)]
        assert tombola(*words, world_size=world_size) == [0] * world_size
        result = find_result(Folder(root / "tiny/line/level-02"))
        assert result is not None
        found.append(result.curves)
    assert found[0] == found[1]


def recalibrated(folder: str) -> None:
    """Writes the statistics that this rank comes to, over two batches of the digits."""
    stage = read_config(write_config(Path(folder), BASE + IMP)).stages[0]
    engine = make_engine(stage)
    session = open_stage(stage, engine, Folder(folder) / "run", Display(shown=False))
    torch.manual_seed(engine.rank)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    for _ in range(2):
        recalibrate(session, model, 2)
        state = {"mean": model[1].running_mean, "var": model[1].running_var}
        path = Path(folder, f"{engine.world_size}.{engine.rank}")
        if path.exists():  # dropout has drawn the same again
            before = torch.load(path, weights_only=True)
            assert all(torch.equal(before[name], value) for name, value in state.items())
        torch.save(state, path)
    engine.close()


def test_the_ranks_recalibrate_together(tmp_path: Path) -> None:
    """All come to the same statistics: means over the ranks' shares, near those of one rank."""
    for world_size in (1, 2):
        assert run_ranks(world_size, recalibrated, str(tmp_path)) == [0] * world_size
    one, first, second = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1.0", "2.0", "2.1")
    )
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0.1, atol=0.05)


MISTAKES: dict[str, Mistake] = {
    "different networks": (
        IMP + DEEPER + STABLE,
        ("--stages.stable.other", "deeper", "--stages.stable.levels", "2"),
        "stages.stable.other = 'deeper': is of another network (cifar_resnet20, not",
    ),
    "other levels than there will be": (
        IMP + DEEPER + LINE.replace("other_levels = [1]\n", ""),
        (),
        "stages.line.other = 'imp-20': there is no level 2 (there is 0, 1)",
    ),
    "fewer other levels": (
        IMP + STABLE,
        ("--stages.stable.other", "imp", "--stages.stable.other-levels", "1"),
        "1 levels to compare with 2: name as many in other_levels as in levels",
    ),
    "no other stage": (
        IMP + STABLE,
        ("--stages.stable.other", "ipm"),
        "stages.stable.other = 'ipm': is no earlier stage; did you mean 'imp'?",
    ),
    "no weights": (
        IMP + STABLE,
        ("--stages.imp.mode", "finetune"),
        "its mode is 'finetune', which keeps no weights of step k",
    ),
    "too few points": (IMP + STABLE, ("--stages.stable.points", "2"), "must be at least 3"),
    "no other": (IMP + STABLE, ("--stages.stable.other-levels", "1"), "needs other"),
    "a stage that makes no tickets": (
        IMP + STABLE + DEEPER.replace('"imp"', '"stable"'),
        (),
        "stages.deeper.ticket = 'stable': is no earlier stage",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_trained(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(MISTAKES[name], tmp_path, capsys)


def test_learning_rate_rewinding_is_compared_by_what_it_was_trained_to(tmp_path: Path) -> None:
    """With `other` no weights of step k are needed."""
    text = BASE + IMP + STABLE.replace("levels = [0, 2]", 'other = "imp"\nlevels = [1]')
    done = run(tmp_path, text + "other_levels = [2]\n", "--stages.imp.mode", "lr")
    assert find_result(Folder(done / "stable/level-01")) is not None


def test_a_result_that_is_damaged_is_named(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/line/level-02/connectivity.json"
    path.write_text(path.read_text().replace("deeper", "deepor"))
    with pytest.raises(RunError, match=r"connectivity\.json: damaged: its content does not match"):
        find_result(Folder(path.parent))


def test_a_finished_stage_needs_its_tickets_no_more(finished: Path, tmp_path: Path) -> None:
    """Other levels than its own, of a run that is gone since."""
    shutil.copytree(finished, tmp_path / "other")
    text = BASE + "[[stages]]" + LINE.rpartition("[[stages]]")[2]
    for stage in ("deeper", "imp-20"):
        text = text.replace(f'"{stage}"', f'"other/{stage}"')
    done = run(tmp_path, text)
    before = facts(done), all_results(Folder(done))
    shutil.rmtree(tmp_path / "other")
    run(tmp_path, text)
    assert (facts(done), all_results(Folder(done))) == before
    assert before[1][0].second == f"{tmp_path}/other/imp-20/level-01"


# ---- the report


def test_a_report_shows_the_tables_of_runs(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["report", str(finished)]) == 0
    printed = capsys.readouterr().out
    for title in ("imp: test accuracy", "deeper: test accuracy", "line: error on the line"):
        assert title in printed
    assert printed.index("imp: test") < printed.index("deeper: test")  # as in the configuration


def test_a_report_as_json(finished: Path) -> None:
    """Every level with its accuracies, IMP's beside elastic ones, and every barrier."""
    (document,) = json_of(["report", str(finished)])
    assert list(document["stages"]) == ["imp", "deeper", "imp-20"]
    assert [row["level"] for row in document["stages"]["imp"]] == [0, 1, 2]
    accuracy = Ticket.load(finished / "deeper/level-02").metrics["test"]["accuracy"]
    assert document["stages"]["deeper"][0]["ticket"] == accuracy
    assert [line["stage"] for line in document["connectivity"]] == ["stable", "stable", "line"]
    assert document["connectivity"][0]["barriers"].keys() == {"train", "test"}


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same stages from another seed, in part."""
    folder = tmp_path_factory.mktemp("another")
    return run(folder, BASE + IMP + DEEPER, "--seed", "4", "--stages.deeper.levels", "1", "2")


def test_a_barrier_between_two_runs_is_measured_level_by_level(
    finished: Path, another: Path
) -> None:
    """Every level of every stage that both have; here from other weights."""
    words = ["report", str(finished), str(another), "--barrier", "--points", "3"]
    document = json_of([*words, "--num-batches", "2", "--train-images", "100"])
    assert [(line["stage"], line["name"]) for line in document] == [
        ("imp", "level-00"),
        ("imp", "level-01"),
        ("imp", "level-02"),
        ("deeper", "level-02"),
    ]
    assert not any(line["same_start"] for line in document)
    (only,) = json_of([*words, "--num-batches", "2", "--levels", "1"])
    assert only["name"] == "level-01"


def test_two_ranks_report_as_one(finished: Path, another: Path, tmp_path: Path) -> None:
    """Over several stages, printed once."""
    words = ["report", str(finished), str(another), "--barrier", "--points", "3"]
    output = tmp_path / "out"
    options = ("--batchnorm", "interpolate")
    assert tombola(*words, *options, world_size=2, output=output) == [0, 0]
    printed = (tmp_path / "out.0").read_text()
    assert printed.count(": error on the line") == 2
    assert printed.count("were trained from different tickets") == 4
    assert (tmp_path / "out.1").read_text() == ""


def test_a_training_is_not_compared_with_itself(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line without length would seem to prove that the ticket is stable."""
    place = f"{finished}/imp/level-02"
    assert run_command(["report", place, place, "--barrier"]) == 2
    assert "both ends are one and the same training" in capsys.readouterr().err


def test_a_report_is_of_the_data_of_the_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured on others, the ends would not be what was trained."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/data.json"
    path.write_text(path.read_text().replace('"digits"', '"idx"'))
    place = f"{tmp_path}/run/imp/level-01"
    assert run_command(["report", place, place, "--barrier", "--points", "3"]) == 2
    assert "was begun on other data" in capsys.readouterr().err


def test_the_report_prints_one_line_for_a_mistake(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(finished)
    assert run_command(["tickets", "copy", f"{place}/imp/level-01", str(tmp_path / "store")]) == 0
    capsys.readouterr()
    stored = f"{tmp_path}/store/{Ticket.load(finished / 'imp/level-01').id}"
    expected = {
        (): "name a run",
        (place, "--barrier"): "name two runs, or two levels",
        (place, "--levels", "1"): "go with --barrier",
        (place, "--data-root", "x"): "go with --barrier",
        (place, "--barrier", "--points", "1"): "--points = 1: must be at least 3",
        (f"{tmp_path}/store",): "is a ticket store; a report is of runs",
        (stored, place, "--barrier"): "is in a store, which has no trained weights",
        (f"{place}/imp/level-01", f"{place}/deeper/level-02", "--barrier"): "different networks",
        (place, place, "--barrier", "--levels", "7"): "have no such level in common",
        (f"{place}x",): "no run and no ticket store there",
        (f"{place}/imp/level-01",): "is one ticket: name its run",
    }
    for words, line in expected.items():
        assert run_command(["report", *words]) == 2
        printed = capsys.readouterr().err
        assert line in printed
        assert printed.count("\n") == 1
