"""Pruning once as stages of whole runs: each score, at init and at k, resumed and refused."""

import os
import shutil
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from family import (
    Mistake,
    assert_goes_on_with_two_ranks,
    assert_refused,
    assert_refused_by_data,
    run,
)
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import TOML, assert_same_run, facts, ticket_facts, write_config
from torch import nn

from data.config import DataConfig
from data.errors import UserError
from data.files import Folder
from data.loader import Batch
from data.order import stream_seed
from data.sources import Data, Placement, open_data
from launch.cli import run_command
from pruning.allocate import erk, keep_count, keep_counts
from pruning.initial_config import InitialConfig, foresee_initial
from pruning.masks import Masks, prunable
from pruning.n_of_m import Pattern, n_of_m
from pruning.scores import grasp, magnitude, snip, synflow
from pruning.sources import Outlook
from pruning.synflow import synflow_masks
from pruning.tickets import Ticket
from train.models import ModelSpec
from train.safe_dcp import read_tensors
from train.session import Outcome, Phase, Session
from train.settings import Settings, TrainConfig

BASE = TOML[: TOML.index("[[stages]]")].replace("3ep", "2ep")
"""two epochs of 13 steps"""
SCORES = ("magnitude", "snip", "grasp", "synflow", "random")


BY_LAYER = 'density = 0.2\ndensities = "erk"\n'
PATTERN = 'pattern = "2:4"\nmisfits = "dense"\n'
AT_K = 'density = [0.1, 0.5]\nat = "5it"\n'


def stage(score: str, options: str = BY_LAYER, name: str = "init") -> str:
    head = f'[[stages]]\nname = "{name}"\nrecipe = "initial"\nscore = "{score}"\n'
    return head + ("iterations = 10\n" if score == "synflow" else "") + options


def network(ticket: Ticket) -> nn.Module:
    """The network with the weights that a ticket starts from, not masked."""
    model = ticket.model.build()
    model.load_state_dict(ticket.weights())
    return model


def digits() -> Data:
    return open_data(DataConfig(batch_size=96), Placement(torch.device("cpu")))


def twelve_of_each_class(data: Data) -> Batch:
    """The first twelve training images of each class, in the order of the recipe's stream."""
    images: list[torch.Tensor] = []
    labels: list[int] = []
    for batch in data.loader(stream_seed(3, "initial", "images")):
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
            if labels.count(label) < 12:
                images.append(image)
                labels.append(label)
        if len(labels) == 120:
            return Batch(torch.stack(images), torch.tensor(labels))
    raise AssertionError("a loader ends")


def parts(batch: Batch, num: int) -> list[Batch]:
    """As the recipe cuts it."""
    cuts = zip(batch.images.tensor_split(num), batch.labels.tensor_split(num), strict=True)
    return [Batch(*cut) for cut in cuts]


def expected_masks(score: str, ticket: Ticket, counts: dict[str, int]) -> Masks | None:
    """By the functions themselves; `None` for random ones."""
    model, data = network(ticket), digits()
    if score == "magnitude":
        return keep_counts(magnitude(model), counts)
    if score == "snip":
        batch = next(iter(data.loader(stream_seed(3, "initial", "images"))))
        return keep_counts(snip(model, [batch]), counts)
    if score == "grasp":
        return keep_counts(grasp(model, parts(twelve_of_each_class(data), 2)), counts)
    if score == "synflow":
        return synflow_masks(model, data.image_shape, counts, iterations=10)
    return None


# ---- what a stage makes


@pytest.mark.parametrize("score", SCORES)
def test_each_score_makes_a_ticket_of_the_initial_weights(score: str, tmp_path: Path) -> None:
    """With ERK's counts in each layer, chosen by the score, named by it, trained from step 0."""
    options = BY_LAYER + ("samples_per_class = 12\n" if score == "grasp" else "")
    ticket = Ticket.load(run(tmp_path, BASE + stage(score, options)) / "init/level-00")
    assert (ticket.method, ticket.level, ticket.step, ticket.control) == (score, 0, 0, False)
    assert (ticket.timing["steps"], ticket.timing["search_steps"]) == (26, 0)
    weights = ticket.weights()
    fresh = ticket.model.build(stream_seed(3, "init")).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in fresh.items())
    shapes = {row.name: row.shape for row in ticket.masks.table()}
    counts = {row.name: row.kept for row in ticket.masks.table()}
    assert counts == erk(shapes, 0.2)
    expected = expected_masks(score, ticket, counts)
    if expected is not None:
        assert ticket.masks == expected
    assert 0 < ticket.metrics["test"]["accuracy"] <= 1


def test_snip_takes_its_gradient_over_as_many_batches(tmp_path: Path) -> None:
    """Of the first two global batches of the recipe's stream, which are not those of the first."""
    text = BASE.replace("2ep", "2it") + stage("snip", BY_LAYER + "num_batches = 2\n")
    ticket = Ticket.load(run(tmp_path, text) / "init/level-00")
    batches = list(islice(digits().loader(stream_seed(3, "initial", "images")), 2))
    counts = {row.name: row.kept for row in ticket.masks.table()}
    assert ticket.masks == keep_counts(snip(network(ticket), batches), counts)
    assert ticket.masks != keep_counts(snip(network(ticket), batches[:1]), counts)


def test_grasp_sees_no_more_images_at_once_than_the_training(tmp_path: Path) -> None:
    """120 images in six parts of 20, whose statistics normalisations use."""
    text = BASE.replace("2ep", "2it") + stage("grasp", BY_LAYER + "samples_per_class = 12\n")
    ticket = Ticket.load(run(tmp_path, text, "--train.micro_batch", "20") / "init/level-00")
    counts = {row.name: row.kept for row in ticket.masks.table()}
    images = twelve_of_each_class(digits())
    six, two = (grasp(network(ticket), parts(images, num)) for num in (6, 2))
    assert ticket.masks == keep_counts(six, counts) != keep_counts(two, counts)


@pytest.mark.parametrize("recipe", ["initial", "dynamic", "dual"])
def test_all_trainings_see_the_data_in_one_order(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Densities, controls, and the dense training before them; a transformation has its own."""
    text = {
        "initial": stage("magnitude", AT_K.replace("5it", "1it") + 'controls = ["random"]\n'),
        "dynamic": 'recipe = "dynamic"\ndensity = [0.3, 0.5]\ninterval = "1it"\n'
        'controls = ["static"]\n',
        "dual": 'recipe = "dual"\ndensity = [0.3, 0.5]\ncontrols = ["random", "budget"]\n'
        'transform.ramp = "1it"\n',
    }[recipe]
    if recipe != "initial":
        text = f'[[stages]]\nname = "one"\n{text}'
    orders: dict[str, tuple[str | int, ...]] = {}
    train = Session.train

    def watched(self: Session, phase: Phase, *arguments: Any) -> Outcome:
        orders[phase.level] = phase.seed_labels
        return train(self, phase, *arguments)

    monkeypatch.setattr(Session, "train", watched)
    run(tmp_path, BASE.replace("2ep", "3it") + text)
    transformed = {orders.pop(name) for name in list(orders) if name.endswith("transform")}
    assert len(orders) == {"initial": 5, "dynamic": 4, "dual": 6}[recipe]
    assert set(orders.values()) == {(recipe, "order")}
    assert transformed == ({("dual", "transform")} if recipe == "dual" else set())


@pytest.fixture(scope="module")
def at_k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two densities of weights that were trained for five steps, and their controls."""
    text = BASE + stage("magnitude", AT_K + 'controls = ["random"]\n')
    return run(tmp_path_factory.mktemp("at_k"), text)


def test_at_step_k_the_dense_network_is_trained_up_to_there_once(at_k: Path) -> None:
    """What is stored are its weights at k; tickets count its steps as those of their search."""
    dense = read_tensors(str(at_k / "init/dense/checkpoints/step-00000005"), is_local=True)
    for name in ("level-00", "level-00-random", "level-01", "level-01-random"):
        ticket = Ticket.load(at_k / f"init/{name}")
        assert ticket.step == 5
        assert (ticket.timing["steps"], ticket.timing["search_steps"]) == (21, 5)
        for weight, value in ticket.weights().items():
            assert torch.equal(value, dense[f"model/{weight}"]), weight
    assert not (at_k / "init/dense/ticket.json").exists()
    steps = {(f["level"], f["step"]) for f in facts(at_k) if f["event"] == "train"}
    assert ("dense", 5) in steps
    assert min(step for level, step in steps if level != "dense") > 5


def test_the_densities_go_from_the_largest_on_and_rank_the_weights_at_k(at_k: Path) -> None:
    """Over all layers; the second is part of the first."""
    for level, density in enumerate((0.5, 0.1)):
        ticket = Ticket.load(at_k / f"init/level-0{level}")
        count = int(density * ticket.masks.size + 0.5)
        assert ticket.masks == keep_count(magnitude(network(ticket)), count)
    first, second = (Ticket.load(at_k / f"init/level-0{level}").masks for level in (0, 1))
    assert (first & second) == second


def test_a_control_has_as_many_weights_in_each_layer(at_k: Path) -> None:
    ticket, control = (Ticket.load(at_k / f"init/level-01{end}") for end in ("", "-random"))
    assert control.control
    assert control.parent == ticket.id
    assert control.masks.table() == ticket.masks.table()
    assert control.masks != ticket.masks


@pytest.mark.parametrize("score", ["snip", "synflow", "random"])
def test_a_pattern_holds_in_the_finished_network(score: str, tmp_path: Path) -> None:
    """2:4 along the inputs of every layer that has whole groups, of the control too."""
    controls = "" if score == "random" else 'controls = ["random"]\n'
    folder = run(tmp_path, BASE + stage(score, PATTERN + controls).replace("iterations = 10\n", ""))
    names = ["level-00"] if score == "random" else ["level-00", "level-00-random"]
    for name in names:
        masks = Ticket.load(folder / f"init/{name}").masks
        assert bool(masks["conv1.weight"].all())  # of one channel
        for row in masks.table()[1:]:
            groups = masks[row.name].movedim(1, -1).reshape(-1, 4)
            assert bool((groups.sum(1) == 2).all()), row.name
        shapes = {row.name: row.shape for row in masks.table()}
        assert {r.name: r.kept for r in masks.table()} == Pattern(2, 4).counts(shapes)
    if score == "synflow":
        assert Ticket.load(folder / "init/level-00").masks == narrowed(folder / "init/level-00")


def narrowed(level: Path) -> Masks:
    """3:4 by SynFlow, and 2:4 of what is left by the flow that is left."""
    model = network(Ticket.load(level))
    masks = Masks.ones(model)
    for num in (3, 2):
        masks.project_(model)
        scores = synflow(model, image_shape=(1, 8, 8))
        masks = n_of_m(scores, num, 4, misfits="dense", within=masks)
    return masks


def test_a_density_of_one_is_the_dense_network(tmp_path: Path) -> None:
    """Beside the others, without any score; excluded layers have no mask."""
    text = BASE + stage("grasp", 'density = [1.0, 0.3]\nexclude = ["fc"]\n')
    folder = run(tmp_path, text)
    assert Ticket.load(folder / "init/level-00").density == 1
    assert "fc.weight" not in Ticket.load(folder / "init/level-01").masks


def test_synflow_is_the_same_under_mixed_precision(tmp_path: Path) -> None:
    """It is computed in float64, whatever the training computes in."""
    digests = set()
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        text = BASE.replace("2ep", "2it") + stage("synflow", 'density = 0.05\nexclude = ["fc"]\n')
        ticket = Ticket.load(run(folder, text, "--train.precision", precision) / "init/level-00")
        assert "fc.weight" not in ticket.masks
        digests.add(ticket.masks.digest())
    assert len(digests) == 1


def test_another_stage_takes_the_tickets(tmp_path: Path) -> None:
    """A SNIP ticket is stretched to a deeper network, from its weights at k."""
    deeper = (
        '[[stages]]\nname = "deeper"\nrecipe = "elastic"\nticket = "init"\nlevels = [1]\n'
        'model.name = "cifar_resnet20"\n'
    )
    text = BASE.replace("resnet8", "resnet14") + stage("snip", AT_K) + deeper
    folder = run(tmp_path, text)
    source, ticket = (Ticket.load(folder / f"{name}/level-01") for name in ("init", "deeper"))
    assert (ticket.parent, ticket.step) == (source.id, 5)
    assert ticket.timing["search_steps"] == 26


# ---- resumed, and on several ranks


@pytest.mark.parametrize(
    ("score", "point", "count"),
    [
        ("grasp", "a step", 3),  # of the dense training
        ("snip", "a save, before its manifest", 1),  # its last step
        ("synflow", "a step", 12),  # of the first ticket
        ("random", "the end of a level, before its ticket", 1),
        ("snip", "two levels", 1),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    score: str, point: str, count: int, tmp_path: Path
) -> None:
    """Weights, masks, metrics and tickets are those of the uninterrupted run."""
    options = AT_K + 'densities = "balanced"\n'
    text = BASE.replace("2ep", "16it") + stage(score, options)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    words = ["run", write_config(killed, text), "--root", str(killed)]
    assert run_ranks(1, killed_run, words, point, count) == [KILLED]
    assert tombola(*words) == [0]
    assert_same_run(killed / "tiny", run(whole, text))


def test_a_run_killed_on_two_ranks_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """In its first ticket, so that the second is of scores that are taken anew."""
    text = BASE.replace("2ep", "8it") + stage("grasp", AT_K + 'controls = ["random"]\n')
    assert_goes_on_with_two_ranks(text, tmp_path, step=7)


def test_a_signal_stops_the_scoring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the batch in which it comes; another attempt scores anew, and comes to the same."""
    words = ["run", write_config(tmp_path, BASE + stage("snip", BY_LAYER + "num_batches = 9\n"))]
    first_batches, drawn = Session.first_batches, 0

    def told_at_the_second(self: Session, num: int, *labels: str | int) -> Iterator[Batch]:
        nonlocal drawn
        for batch in first_batches(self, num, *labels):
            drawn += 1
            if drawn == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Session, "first_batches", told_at_the_second)
        assert run_command([*words, "--root", str(tmp_path / "stopped")]) == 75
    printed = capsys.readouterr().err
    assert "interrupted: while the weights of init were scored; the same command" in printed
    assert (printed.count("\n"), drawn) == (1, 2)
    for root in ("stopped", "whole"):
        assert run_command([*words, "--root", str(tmp_path / root)]) == 0
    assert_same_run(tmp_path / "stopped/tiny", tmp_path / "whole/tiny")


def test_dropout_in_a_score_is_the_same_in_another_attempt(tmp_path: Path) -> None:
    """Killed behind the first ticket: the second is of the scores that chose the first."""
    model = 'model.name = "resnet18"\nmodel.width = 4\nmodel.drop_rate = 0.5\n'
    text = BASE.replace("2ep", "8it") + stage("snip", AT_K) + model
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
        words = ["run", write_config(folder, text), "--root", str(folder)]
        if folder.name == "killed":
            assert run_ranks(1, killed_run, words, "two levels", 1) == [KILLED]
        assert tombola(*words) == [0]
    assert_same_run(folders[1] / "tiny", folders[0] / "tiny")
    masks = [Ticket.load(folders[1] / f"tiny/init/level-0{level}").masks for level in (0, 1)]
    assert (masks[0] & masks[1]) == masks[1]


def test_a_finished_run_does_nothing(at_k: Path) -> None:
    before = (at_k / "metrics.jsonl").read_bytes(), ticket_facts(at_k)
    run(at_k.parent, (at_k.parent / "tiny.toml").read_text())
    assert ((at_k / "metrics.jsonl").read_bytes(), ticket_facts(at_k)) == before


def test_a_dense_training_that_is_gone_is_done_again(tmp_path: Path) -> None:
    """Where a level needs its weights; the levels that are finished stay."""
    text = BASE.replace("2ep", "16it") + stage("magnitude", AT_K)
    folder = run(tmp_path, text)
    before = ticket_facts(folder)
    shutil.rmtree(folder / "init/dense")
    shutil.rmtree(folder / "init/level-01")
    assert ticket_facts(run(tmp_path, text)) == before


def test_one_and_two_ranks_choose_the_same_masks(tmp_path: Path) -> None:
    """With a normalisation that does not depend on the batch."""
    base = BASE.replace("width = 4", 'width = 8\nnorm = "group"').replace("2ep", "3it")
    text = base + "".join(
        stage(score, 'density = 0.3\ndensities = "erk"\n', score) for score in SCORES
    )
    options = 'num_batches = 2\ncontrols = ["random"]\n'
    text = text.replace('score = "snip"\n', f'score = "snip"\n{options}')
    digests: list[dict[str, str]] = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        words = ["run", write_config(folder, text), "--root", str(folder)]
        assert tombola(*words, world_size=world_size) == [0] * world_size
        places = {score: folder / f"tiny/{score}/level-00" for score in SCORES}
        places["control"] = folder / "tiny/snip/level-00-random"
        digests.append({name: Ticket.load(p).masks.digest() for name, p in places.items()})
    assert digests[0] == digests[1]
    assert len(set(digests[0].values())) == len(SCORES) + 1


# ---- mistakes


MISTAKES: list[Mistake] = [
    (stage("snpi"), (), "score = 'snpi': is not known; did you mean 'snip'?"),
    (stage("snip", ""), (), "density: give at least one, or a pattern"),
    (stage("snip", "density = 1.5\n"), (), "density = '1.5': must be above 0 and at most 1"),
    (stage("snip", "density = [0.5, 0.5]\n"), (), "give each once"),
    (stage("snip", 'density = 0.5\ncontrols = ["random", "random"]\n'), (), "name each once"),
    (stage("random", "density = 0.5\n"), (), "choose uniform, erk or balanced"),
    (stage("snip", 'density = 0.5\nmisfits = "dense"\n'), (), "misfits = 'dense': needs a pattern"),
    (stage("snip", 'pattern = "4:2"\n'), (), "pattern = '4:2': is no pattern: write '2:4'"),
    (stage("snip", 'pattern = "2:4"\ndensity = 0.5\n'), (), "leave out density and densities"),
    (stage("snip", 'pattern = "2:4"\ndensities = "erk"\n'), (), "leave out density and densities"),
    (
        stage("snip", 'pattern = "2:4"\n') + "model.width = 6\n",
        (),
        "stages.0.0.conv1.weight of (6, 6, 3, 3) has 6 inputs, not a multiple of 4: exclude it",
    ),
    (stage("snip", 'density = 0.5\nexclude = ["fcc"]\n'), (), "exclude = 'fcc' matches no"),
    (stage("snip", 'density = 0.5\nat = "5"\n'), (), "at = '5': is not a duration"),
    (
        stage("snip", "density = 0.5\nnum_batches = 0\n"),
        (),
        "num_batches = '0': must be at least 1",
    ),
    (stage("grasp", "density = 0.5\nnum_batches = 2\n"), (), "score = 'grasp' has no use for it"),
    (stage("snip", "density = 0.5\niterations = 9\n"), (), "score = 'snip' has no use for it"),
    (
        stage("random", 'density = 0.5\ndensities = "erk"\ncontrols = ["random"]\n'),
        (),
        "the tickets are random themselves",
    ),
    (
        stage("snip").replace("snip", "magnitude") + "samples_per_class = 3\n",
        (),
        "samples_per_class = '3': score = 'magnitude' has no use for it",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_clear_line(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """... before anything is trained or written."""
    assert_refused(mistake, tmp_path, capsys, base=BASE)


def test_grasp_with_statistics_over_all_ranks_is_refused() -> None:
    """The ranks would wait for each other: each has its own number of batches."""
    settings = Settings(train=TrainConfig(sync_batchnorm=True))
    outlook = Outlook(Folder("nowhere"), {})
    foresee_initial("init", InitialConfig("snip", (0.5,)), settings, outlook)
    with pytest.raises(UserError, match=r"stages\.init: train\.sync_batchnorm = true: .* leave it"):
        foresee_initial("init", InitialConfig("grasp", (0.5,)), settings, outlook)


TOLD_BY_THE_DATA: dict[str, tuple[str, str]] = {
    "density": (
        stage("snip", 'density = 0.0005\ndensities = "uniform"\nat = "5it"\n'),
        "stages.init: density = 0.0005 keeps none of the 36 weights of conv1.weight",
    ),
    "global density": (
        stage("snip", 'density = 1e-9\nat = "5it"\n'),
        "stages.init: density = 1e-09 keeps none of",
    ),
    "at": (
        stage("snip", 'density = 0.5\nat = "2ep"\n'),
        "stages.init.at = '2ep' is step 26: must be before the end",
    ),
    "pattern": (
        stage("snip", 'pattern = "2:4"\nat = "5it"\n'),
        "stages.init: pattern = '2:4': conv1.weight of (4, 1, 3, 3) has 1 inputs, not a multiple",
    ),
    "pattern of nothing": (
        stage("snip", 'pattern = "1:7"\nmisfits = "dense"\nat = "5it"\n'),
        "stages.init: pattern = '1:7': fits no layer, so that all would stay dense",
    ),
    "samples": (
        stage("grasp", 'density = 0.5\nsamples_per_class = 500\nat = "5it"\n'),
        "stages.init: samples_per_class = 500: class '0' has ",
    ),
}


@pytest.mark.parametrize("case", TOLD_BY_THE_DATA)
def test_what_only_the_data_tell_is_refused_before_the_stage_is_trained(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = TOLD_BY_THE_DATA[case]
    assert_refused_by_data(BASE + text, expected, tmp_path, capsys, "init")


def test_an_epoch_with_too_few_images_of_a_class_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are enough, but the incomplete batch at the end is left out."""
    fewest = min(torch.bincount(torch.cat([b.labels for b in digits().training_images()])).tolist())
    text = BASE + stage("grasp", f"density = 0.5\nsamples_per_class = {fewest}\n")
    options = ["--data.batch_size", "700"]
    words = ["run", write_config(tmp_path, text), "--root", str(tmp_path), *options]
    assert run_command(words) == 2
    printed = capsys.readouterr().err
    assert f"samples_per_class = {fewest}: an epoch of whole batches has only" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
def test_scores_that_are_all_zero_are_one_line(
    score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm's ResNets begin with a gain of zero at the end of each block: no gradient passes.

    The line names the option with which they do not.
    """
    text = BASE + stage(score, "density = 0.5\n") + 'model.name = "resnet18"\nmodel.width = 4\n'
    assert run_command(["run", write_config(tmp_path, text), "--root", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "all scores of layer1.0.conv1.weight are zero: no gradient reaches it" in printed
    assert "model.zero_init_last = false" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
def test_a_resnet_whose_gains_begin_with_one_has_scores(score: str, tmp_path: Path) -> None:
    """The same network with the option of which the refusal tells."""
    options = "samples_per_class = 1\n" if score == "grasp" else ""
    text = BASE + stage(score, "density = 0.5\n" + options)
    text += 'model.name = "resnet18"\nmodel.width = 4\nmodel.zero_init_last = false\n'
    folder = run(tmp_path, text, "--train.total", "1it")
    ticket = Ticket.load(folder / "init/level-00")
    assert ticket.model.arguments == {"width": 4, "zero_init_last": False}
    assert ticket.masks.kept == round(ticket.masks.size / 2)


def test_the_shapes_of_a_stage_are_those_of_its_network() -> None:
    """What is refused beforehand is looked at without memory for weights."""
    outline = ModelSpec("resnet50", 1000, 3).outline()
    config: Any = InitialConfig(density=(0.1,), densities="erk", exclude=("fc",))
    shapes = config.shapes(outline)
    assert list(shapes) == list(prunable(outline, ["fc"]))
    assert sum(config.kept(shapes)[0].values()) == round(0.1 * 23_454_912)
