"""Multi-prize tickets as stages of whole runs: found, resumed, refused, on one rank and on two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family import (
    Mistake,
    assert_goes_on_with_two_ranks,
    assert_refused,
    assert_refused_by_data,
    assert_same_masks_on_two_ranks,
    run,
)
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import TOML, assert_same_run, facts, final_states, ticket_facts, write_config

from data.errors import RunError
from data.files import Folder
from launch.cli import run_command
from launch.config import read_config
from pruning import score_training
from pruning.choosing import num_kept
from pruning.prizes import Prize
from pruning.signed_weights import SignedWeights
from pruning.tickets import Ticket
from pruning.weight_store import StoredWeights
from train.engine import Engine
from train.models import ModelSpec

OWN = '[optimizer]\nlr = 0.1\n[schedule]\nname = "linear"\n'
BASE = TOML[: TOML.index("[[stages]]")].replace(OWN, "").replace("3ep", "2ep")
"""two epochs of 13 steps; optimizer and schedule as the recipe has them"""
PRIZE = """
[[stages]]
name = "prize"
recipe = "multiprize"
density = 0.3
batchnorm = "learned"
"""
SIGNS = PRIZE + 'model.activation = "sign"\n'
GLOBAL = PRIZE.replace("0.3", "0.1") + 'scope = "global"\nramp = "20it"\nmin_kept = 3\n'
IMP = """
[[stages]]
name = "imp"
recipe = "imp"
rounds = 2
prune_fraction = 0.4
"""
SEEDED = IMP + PRIZE.replace("0.3", '"ticket"\nticket = "imp"\nlevels = [1, 2]')


# ---- what a stage makes


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three densities one after the other, normalisations fixed."""
    text = BASE + PRIZE.replace("0.3", "[0.1, 0.5, 1.0]").replace("learned", "fixed")
    return run(tmp_path_factory.mktemp("sweep"), text)


def test_a_sweep_makes_one_ticket_a_density(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The densest first, of each layer exactly its share, in one table and one picture."""
    for level, density in enumerate((1.0, 0.5, 0.1)):
        ticket = Ticket.load(sweep / f"prize/level-0{level}")
        assert (ticket.method, ticket.level) == ("multiprize", level)
        for row in ticket.masks.table():
            assert row.kept == num_kept(density, row.size), row.name
        assert 0 < ticket.metrics["test"]["accuracy"] <= 1
    assert (sweep / "accuracy.png").stat().st_size > 10_000
    shown = run(sweep.parent, (sweep.parent / "tiny.toml").read_text())
    assert shown == sweep
    table = capsys.readouterr().out
    assert "prize: test accuracy" in table
    assert all(text in table for text in ("10.", "50.", "100.00%"))


def test_a_ticket_is_the_network_that_was_measured(sweep: Path) -> None:
    """Its weights are gain * sign(W) * M, and give the accuracy that the ticket tells."""
    from data.config import DataConfig
    from data.sources import Placement, open_data

    ticket = Ticket.load(sweep / "prize/level-01")
    assert isinstance(ticket.stored_weights, SignedWeights)
    model = ticket.build_model().eval()
    for name, mask in ticket.masks.items():
        weight, gain = model.get_parameter(name), ticket.stored_weights.layers[name].gain
        assert torch.equal(weight != 0, mask)
        assert weight[mask].abs().unique().tolist() == [gain]
    data = open_data(DataConfig(), Placement(torch.device("cpu")))
    prize = Prize.of(ticket).build_model()
    for network in (model, prize):
        right = count = 0
        with torch.no_grad():
            for images, labels in data.evaluation["test"]:
                right += int((network(images).argmax(1) == labels).sum())
                count += len(labels)
        assert right / count == pytest.approx(ticket.metrics["test"]["accuracy"], abs=1e-9)


def test_all_densities_share_their_random_signs(sweep: Path) -> None:
    """A sweep compares choices among the same weights."""
    other, one = (Ticket.load(sweep / f"prize/level-0{level}") for level in (0, 2))
    assert isinstance(one.stored_weights, SignedWeights)
    assert isinstance(other.stored_weights, SignedWeights)
    assert one.stored_weights.seed == other.stored_weights.seed
    kept = one.masks["conv1.weight"]
    signs = [torch.sign(ticket.weights()["conv1.weight"]) for ticket in (one, other)]
    assert torch.equal(signs[0][kept], signs[1][kept])


def test_fixed_normalisations_have_weight_one_and_bias_zero(sweep: Path) -> None:
    weights = Ticket.load(sweep / "prize/level-01").weights()
    assert bool((weights["norm1.weight"] == 1).all())
    assert not bool(weights["norm1.bias"].any())
    assert bool(weights["norm1.running_mean"].any())


def test_only_scores_are_trained(sweep: Path) -> None:
    """No optimizer state and no gradient of anything else; the random weights are not saved."""
    states = final_states(sweep)["prize/level-01/checkpoints"]
    trained = {name.removeprefix("optimizer/state/") for name in states if "momentum" in name}
    assert trained
    assert all(".scores" in name for name in trained)
    assert not [name for name in states if name.startswith("model/") and ".random" in name]


def test_a_seed_and_a_mask_are_what_is_stored(sweep: Path) -> None:
    """The objects of the weights hold no weight of a layer."""
    stored = Ticket.load(sweep / "prize/level-01").stored_weights
    assert isinstance(stored, SignedWeights)
    assert stored.signs is None
    assert not stored.layers.keys() & stored.rest.tensors.keys()
    model = ModelSpec("cifar_resnet8", 10, 1, {"width": 4}).outline()
    assert stored.shapes.keys() == model.state_dict().keys()


def test_a_ticket_of_imp_gives_the_densities_of_layers(tmp_path: Path) -> None:
    """As many weights of each layer as it keeps there, at each of its levels; it is the parent."""
    folder = run(tmp_path, BASE + SEEDED)
    for level in (1, 2):
        source = Ticket.load(folder / f"imp/level-0{level}")
        found = Ticket.load(folder / f"prize/level-0{level}")
        assert found.parent == source.id
        kept = [[row.kept for row in ticket.masks.table()] for ticket in (source, found)]
        assert kept[0] == kept[1]
        assert found.masks != source.masks


def test_a_ticket_that_empties_a_layer_gives_no_densities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the layer; the stage has not begun."""
    text = BASE + SEEDED.replace("rounds = 2", "rounds = 1").replace("[1, 2]", "[1]")
    sparse = text.replace("prune_fraction = 0.4", "prune_fraction = 0.997")
    words = ["run", write_config(tmp_path, sparse), "--root", str(tmp_path)]
    assert run_command(words) == 2
    printed = capsys.readouterr().err
    assert "imp/level-01 keeps nothing of" in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "tiny/prize/level-01").exists()


def test_a_finished_stage_needs_its_source_no_more(tmp_path: Path) -> None:
    """The run that gave the densities may be gone."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    imp = run(source, BASE + IMP.replace("rounds = 2", "rounds = 1"))
    text = BASE + PRIZE.replace("0.3", f'"ticket"\nticket = "{imp}/imp/level-01"')
    before = ticket_facts(run(target, text))
    imp.rename(tmp_path / "elsewhere")
    assert ticket_facts(run(target, text)) == before


def test_a_global_density_is_exact_and_ramps_down(tmp_path: Path) -> None:
    """From 50 % by the third power of what is left of the ramp; no layer below its least."""
    folder = run(tmp_path, BASE + GLOBAL)
    ticket = Ticket.load(folder / "prize/level-00")
    size = ticket.masks.size
    assert ticket.masks.kept == num_kept(0.1, size)
    assert min(row.kept for row in ticket.masks.table()) >= 3
    told = {f["step"]: f["density"] for f in facts(folder) if f["event"] == "train"}
    for step in (5, 10, 15):
        expected = 0.1 + 0.4 * (1 - step / 20) ** 3
        assert told[step] == pytest.approx(expected, abs=1 / size)
    assert told[20] == told[26] == ticket.density


def test_edge_popup_keeps_real_random_weights(tmp_path: Path) -> None:
    """The ticket is an ordinary one: weights at random, and which of them."""
    text = BASE + PRIZE + 'weights = "float"\ninit = "kaiming_normal"\n'
    ticket = Ticket.load(run(tmp_path, text) / "prize/level-00")
    assert isinstance(ticket.stored_weights, StoredWeights)
    weight = ticket.weights()["stages.0.0.conv1.weight"]
    assert len(weight.unique()) == weight.numel()
    assert ticket.masks.kept < ticket.masks.size


@pytest.mark.parametrize("trained", [False, True])
def test_first_and_last_layer_can_stay_dense(trained: bool, tmp_path: Path) -> None:
    """Real and random; they are trained only if that is asked for."""
    dense = "dense_first = true\ndense_last = true\n" + "train_dense = true\n" * trained
    folder = run(tmp_path, BASE + PRIZE + dense)
    ticket = Ticket.load(folder / "prize/level-00")
    assert {"conv1.weight", "fc.weight"}.isdisjoint(ticket.masks)
    states = final_states(folder)["prize/level-00/checkpoints"]
    has_state = [n for n in states if "momentum" in n and ("conv1.weight" in n or "fc." in n)]
    assert bool([n for n in has_state if "stages" not in n]) is trained
    weights = ticket.weights()
    assert len(weights["conv1.weight"].unique()) == weights["conv1.weight"].numel()


def test_binary_activations_are_part_of_the_model(tmp_path: Path) -> None:
    """A 1/1 ticket rebuilds them, and its layers behind the first run as bits."""
    from pruning.packed import num_packed, packed_model

    ticket = Ticket.load(run(tmp_path, BASE + SIGNS) / "prize/level-00")
    assert ticket.model.arguments["activation"] == "sign"
    prize, images = Prize.of(ticket), torch.randn(5, 1, 8, 8)
    packed = packed_model(prize, images)
    assert num_packed(packed) == 8  # six 3x3 convolutions and two shortcuts
    with torch.no_grad():
        assert torch.equal(packed(images), prize.build_model()(images))


# ---- masks follow the scores once an update


def test_masks_are_chosen_once_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each of three micro-batches, and not in the evaluations."""
    num_chosen = []
    choose = score_training.choose

    def counted(*arguments: Any) -> Any:
        num_chosen.append(1)
        return choose(*arguments)

    monkeypatch.setattr(score_training, "choose", counted)
    run(tmp_path, BASE + PRIZE, "--train.micro_batch", "32")
    assert len(num_chosen) == 1 + 26  # at the start, and after each update


def test_scores_stay_float32_under_autocast(tmp_path: Path) -> None:
    folder = run(
        tmp_path, BASE + PRIZE, "--train.precision", "bf16", "--train.channels-last", "true"
    )
    states = final_states(folder)["prize/level-00/checkpoints"]
    scores = [value for name, value in states.items() if name.endswith(".scores")]
    assert scores
    assert all(value.dtype == torch.float32 for value in scores)
    assert any(bool((value != value.bfloat16().float()).any()) for value in scores)


def test_scores_that_are_no_numbers_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the step and the remedy; the checkpoint before it stays."""
    words = ["run", write_config(tmp_path, BASE + PRIZE), "--root", str(tmp_path)]
    assert tombola(*words, "--optimizer.lr", "1e38", output=tmp_path / "out") == [1]
    printed = (tmp_path / "out.0").read_text()
    assert "not a number" in printed or "the loss is not finite" in printed
    assert "Lower optimizer.lr" in printed
    assert "Traceback" not in printed


# ---- resumed, and on several ranks


@pytest.mark.parametrize("text", [GLOBAL, SIGNS, SEEDED], ids=["global", "signs", "ticket"])
def test_a_killed_run_goes_on_bit_for_bit(text: str, tmp_path: Path) -> None:
    """Scores, masks, metrics and tickets are those of the uninterrupted run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    words = ["run", write_config(killed, BASE + text), "--root", str(killed)]
    steps = 13 if text is not SEEDED else 26 * 4 - 5
    assert run_ranks(1, killed_run, words, "a step", steps) == [KILLED]
    assert tombola(*words) == [0]
    assert_same_run(killed / "tiny", run(whole, BASE + text))


def test_a_run_killed_on_two_ranks_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert_goes_on_with_two_ranks(BASE + GLOBAL, tmp_path, step=13)


def test_one_and_two_ranks_choose_the_same_masks(tmp_path: Path) -> None:
    """After 20 steps, with a normalisation that does not depend on the batch."""
    text = BASE.replace("width = 4", 'width = 8\nnorm = "group"').replace("2ep", "20it")
    assert_same_masks_on_two_ranks(
        text + PRIZE, tmp_path, "prize/level-00", "--optimizer.lr", "0.02"
    )


def diverging(words: list[str]) -> None:
    """A run in which rank 1's scores move by the smallest amount after the third update."""
    from processes import command

    update = Engine.update

    def moved(self: Engine, state: Any) -> None:
        if self.rank == 1 and state.step == 3:
            with torch.no_grad():
                for name, value in state.model.named_parameters():
                    if name == "conv1.scores":
                        value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(9.0))
        update(self, state)

    Engine.update = moved  # type: ignore[method-assign]
    command(words, str(Path(words[1]).parent / "out"))


def test_ranks_whose_scores_differ_stop(tmp_path: Path) -> None:
    """At the first update after which one has other scores, were it by one bit."""
    words = ["run", write_config(tmp_path, BASE + PRIZE), "--root", str(tmp_path)]
    assert run_ranks(2, diverging, words) == [1, 1]
    printed = (tmp_path / "out.0").read_text()
    assert "after 4 steps the scores differ between the ranks" in printed


def test_a_checkpoint_of_other_masks_is_refused() -> None:
    """The masks follow from the scores; were they others, something was lost."""
    from torch import nn

    from pruning.multiprize import score
    from train.ranks import ALONE

    model = nn.Sequential(nn.Linear(8, 4))
    score(model)
    with torch.no_grad():
        model[0].scores.copy_(torch.rand(4, 8))  # type: ignore[operator]
    sparsity = score_training.TrainedScores(score_training.Share(0.5), ALONE, model)
    saved = sparsity.state_dict()
    sparsity.load_state_dict(saved)
    with pytest.raises(ValueError, match="choose other masks"):
        sparsity.load_state_dict({**saved, "digest": "0" * 64})
    with pytest.raises(ValueError, match="other random weights"):
        sparsity.load_state_dict({**saved, "weights": "0" * 64})
    with torch.no_grad():
        model[0].scores.fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(RunError, match="not a number"):
        sparsity.after_update(4)


@pytest.mark.parametrize("read", ["facts", "state_dict"])
def test_on_a_gpu_a_nan_is_noted_and_told_where_it_is_logged_or_saved(
    read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the step after which it came, and by either alone; the masks are chosen all the same."""
    from torch import nn

    from pruning import choosing
    from pruning.multiprize import score
    from train.ranks import ALONE

    monkeypatch.setattr(choosing, "on_device", lambda scores: True)
    model = nn.Sequential(nn.Linear(8, 4))
    score(model)
    with torch.no_grad():
        model[0].scores.copy_(torch.rand(4, 8))  # type: ignore[operator]
        sparsity = score_training.TrainedScores(score_training.Share(0.5), ALONE, model)
        getattr(sparsity, read)()
        model[0].scores[1, 2] = float("nan")  # type: ignore[index]
    for step in (4, 5):
        sparsity.after_update(step)
        assert sparsity.density == 0.5
    with pytest.raises(RunError, match="after 5 steps a score is not a number; no checkpoint"):
        getattr(sparsity, read)()


# ---- configuration


def test_the_recipe_has_defaults_of_its_own(tmp_path: Path) -> None:
    """The authors' cosine and weight decay, each unless the run or the stage sets anything in that
    section: milestones are of another schedule, and the decay is not of another optimizer."""
    dense = IMP.replace("rounds = 2", "rounds = 0")
    config = read_config(write_config(tmp_path, BASE + dense + PRIZE))
    imp, prize = config.stages
    assert (imp.settings.schedule.name, imp.settings.optimizer.weight_decay) == ("step", 1e-4)
    assert (prize.settings.schedule.name, prize.settings.optimizer.weight_decay) == ("cosine", 5e-4)
    given = read_config(
        write_config(tmp_path, BASE + "[optimizer]\nweight_decay = 0.1\n" + PRIZE),
        ["--stages.prize.schedule.name", "linear"],
    )
    (stage,) = given.stages
    assert (stage.settings.schedule.name, stage.settings.optimizer.weight_decay) == ("linear", 0.1)
    milestones = "[schedule]\nmilestones = ['1ep']\n[optimizer]\nname = 'adam'\n"
    (stage,) = read_config(write_config(tmp_path, BASE + milestones + PRIZE)).stages
    assert (stage.settings.schedule.name, stage.settings.optimizer.weight_decay) == ("step", 1e-4)


def test_a_resolved_configuration_keeps_the_recipe_s_defaults(tmp_path: Path) -> None:
    """So that a run goes on with its own config.toml."""
    folder = run(tmp_path, BASE + PRIZE, "--train.total", "3it")
    before = ticket_facts(folder)
    again = read_config(str(folder / "config.toml"))
    assert again.stages[0].settings.schedule.name == "cosine"
    assert tombola("run", str(folder / "config.toml"), "--root", str(tmp_path)) == [0]
    assert ticket_facts(folder) == before


MISTAKES: list[Mistake] = [
    (PRIZE.replace("0.3", "0.0"), (), "density = '0.0': must be above 0 and at most 1"),
    (PRIZE.replace("0.3", "[0.3, 1.5]"), (), "density = '0.3 1.5': must be above 0 and at most 1"),
    (PRIZE.replace("0.3", "[0.3, 0.3]"), (), "give at least one, and each once"),
    (PRIZE.replace("0.3", "[]"), (), "density"),
    (PRIZE.replace("0.3", '"tickets"'), (), "['tickets'] is not of the form {[FLOAT"),
    (PRIZE.replace("0.3", '"ticket"'), (), "density = 'ticket': needs ticket, the stage"),
    (PRIZE + 'ticket = "imp"\n', (), "ticket = 'imp': needs density = 'ticket'"),
    (PRIZE + "levels = [1]\n", (), "levels = '1': needs density = 'ticket'"),
    (PRIZE + "min_kept = 0\n", (), "min_kept = '0': must be at least 1"),
    (PRIZE + "min_kept = 2\n", (), "more needs scope = 'global'"),
    (PRIZE + 'ramp = "5"\n', (), "ramp"),
    (PRIZE + "train_dense = true\n", (), "train_dense = 'True': needs dense_first or dense_last"),
    (PRIZE.replace("0.3", "1.0") + 'scaled = "biprop"\n', (), "scaled = 'biprop': needs a density"),
    (PRIZE, ("--train.ema", "0.9"), "train.ema = 0.9: averaged scores choose other weights"),
    (PRIZE + 'weights = "ternary"\n', (), "weights"),
    (SEEDED.replace('ticket = "imp"', 'ticket = "ipm"'), (), "did you mean 'imp'?"),
    (SEEDED.replace("[1, 2]", "[3]"), (), "there is no level 3"),
    (SEEDED + "model.width = 8\n", (), "name a ticket of the same network"),
    (SEEDED + 'scope = "global"\n', (), "leave out scope and ramp"),
    (
        PRIZE + 'model.name = "resnet50"\nmodel.activation = "sign"\n',
        ("--model.width", "None"),
        "activation",
    ),
    (PRIZE + 'model.name = "nfnet_f0"\n', ("--model.width", "None"), "standardises its weights"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_clear_line(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """... before anything is trained or written."""
    assert_refused(mistake, tmp_path, capsys, base=BASE)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (GLOBAL.replace("0.1", "0.0001"), "3 in each of 10 layers are 30: keep more"),
        (GLOBAL.replace("20it", "2ep"), "ramp = '2ep' is step 26: must be before the end"),
    ],
    ids=["least", "ramp"],
)
def test_what_only_the_data_tell_is_refused_before_the_stage_is_trained(
    stage: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused_by_data(BASE + stage, expected, tmp_path, capsys, "prize")


def test_a_layer_that_is_not_called_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BEiT reads the weight of a layer and computes with it: its gain would be lost."""
    mistake = (
        PRIZE + 'model.name = "beit_base_patch16_224"\n',
        ("--model.width", "None"),
        "beit_base_patch16_224: it does not call its layer blocks.0.attn.qkv.weight",
    )
    assert_refused(mistake, tmp_path, capsys, base=BASE)


# ---- other stages


def test_a_line_ends_in_the_tickets_themselves(tmp_path: Path) -> None:
    """Between two multi-prize tickets: their masked weights, at their own accuracies."""
    from pruning.connectivity import all_results

    line = """
[[stages]]
name = "line"
recipe = "connectivity"
ticket = "prize"
other = "prize"
levels = [0]
other_levels = [1]
batchnorm = "interpolate"
points = 3
"""
    folder = run(tmp_path, BASE + PRIZE.replace("0.3", "[0.1, 0.5]") + line)
    (result,) = all_results(Folder(str(folder)))
    errors = result.curves["test"].errors
    for place, error in (("prize/level-00", errors[0]), ("prize/level-01", errors[-1])):
        accuracy = Ticket.load(folder / place).metrics["test"]["accuracy"]
        assert 1 - error == pytest.approx(accuracy, abs=1e-6)


def test_the_sparsest_of_a_sweep_is_what_others_take(tmp_path: Path) -> None:
    """The levels go from the densest to the sparsest, as those of IMP."""
    taken = PRIZE.replace('"prize"', '"again"').replace("0.3", '"ticket"\nticket = "prize"')
    folder = run(tmp_path, BASE + PRIZE.replace("0.3", "[0.1, 0.5]") + taken)
    assert Ticket.load(folder / "again/level-01").density == pytest.approx(0.1, abs=0.01)
