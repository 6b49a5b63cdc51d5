"""Parts of a run: several processes do them in one folder, and come to what one comes to."""

import json
import threading
from pathlib import Path

import pytest
import torch
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import TOML, final_states, ticket_facts, write_config

from data.errors import UserError
from data.files import Folder, Journal
from launch.cli import run_command
from launch.config import read_config
from launch.parts import Unit, label, needs, stages_of, units_of
from pruning.sources import Promise
from train.metrics import Recorder
from train.models import ModelConfig

TREE = (
    TOML.replace("cifar_resnet8", "cifar_resnet14").replace(
        'controls = ["random"]', 'controls = ["random", "reinit"]\ncontrol_levels = [2]'
    )
    + """
[[stages]]
name = "deeper"
recipe = "elastic"
ticket = "imp"
model.name = "cifar_resnet20"
controls = ["random"]
[[stages]]
name = "shallower"
recipe = "elastic"
ticket = "imp"
model.name = "cifar_resnet8"
"""
)
GROWS = """
[[stages]]
name = "grows"
recipe = "growth"
model.name = "cifar_resnet8"
grow = ["stages.0"]
density = 0.5
controls = ["dense"]
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as one process does it."""
    folder = tmp_path_factory.mktemp("whole")
    assert tombola("run", write_config(folder, TREE), "--root", str(folder)) == [0]
    return folder / "tiny"


def assert_same_results(run: Path, reference: Path) -> None:
    """Tickets with all that they tell, and final states are equal, bit for bit."""
    assert ticket_facts(run) == ticket_facts(reference)
    states, others = final_states(run), final_states(reference)
    assert states.keys() == others.keys()
    for level, tensors in others.items():
        assert all(torch.equal(states[level][name], value) for name, value in tensors.items())


def recorded(run: Path) -> list[str]:
    """All facts of a run, without what depends on the hour, in the order of their words."""
    lines = [line for path in run.glob("metrics*.jsonl") for line in path.read_text().splitlines()]
    facts = [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]
    return sorted(map(json.dumps, facts))


def test_parts_side_by_side_are_the_whole_run(whole: Path, tmp_path: Path) -> None:
    """Tickets first; then two controls, two elastic targets and a control of one, all at once."""
    run = ["run", write_config(tmp_path, TREE), "--root", str(tmp_path), "--only"]
    assert tombola(*run, "imp:tickets") == [0]
    codes: dict[str, list[int]] = {}

    def start(*parts: str) -> None:
        codes[" ".join(parts)] = tombola(*run, *parts)

    several = [("imp:random",), ("imp:reinit", "shallower"), ("deeper",)]
    threads = [threading.Thread(target=start, args=parts) for parts in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {" ".join(parts): [0] for parts in several}
    assert_same_results(tmp_path / "tiny", whole)
    assert recorded(tmp_path / "tiny") == recorded(whole)
    files = {path.name for path in (tmp_path / "tiny").glob("metrics*")}
    assert files == {
        "metrics-imp.tickets.jsonl",
        "metrics-imp.random.jsonl",
        "metrics-imp.reinit+shallower.jsonl",
        "metrics-deeper.jsonl",
    }


def test_the_whole_run_goes_on_from_its_parts(whole: Path, tmp_path: Path) -> None:
    """Of two at once one was killed; the rest is done by one process, and no fact is doubled."""
    run = ["run", write_config(tmp_path, TREE), "--root", str(tmp_path)]
    assert tombola(*run, "--only", "imp:tickets") == [0]
    codes: list[int] = []
    beside = threading.Thread(target=lambda: codes.extend(tombola(*run, "--only", "imp:reinit")))
    beside.start()
    words = [*run, "--only", "deeper:tickets", "--checkpoint.every", "5it"]
    assert run_ranks(1, killed_run, words, "a step", 20) == [KILLED]
    beside.join()
    assert codes == [0]
    assert tombola("report", str(tmp_path / "tiny")) == [0]
    assert tombola(*run) == [0]
    assert_same_results(tmp_path / "tiny", whole)
    assert recorded(tmp_path / "tiny") == recorded(whole)
    before = recorded(tmp_path / "tiny")
    assert tombola(*run, "--only", "deeper", "imp:random") == [0]
    assert recorded(tmp_path / "tiny") == before


def test_a_part_of_a_seed(tmp_path: Path) -> None:
    """Parts and seeds go together: a folder a seed."""
    run = ["run", write_config(tmp_path, TREE.replace("seed = 3\n", "")), "--root", str(tmp_path)]
    assert tombola(*run, "--seeds", "1", "--only", "imp:tickets") == [0]
    assert sorted(p.name for p in (tmp_path / "tiny/seed-1/imp").iterdir()) == [
        "level-00",
        "level-01",
        "level-02",
    ]


def test_parts_on_two_ranks_are_the_whole_run_on_two_ranks(tmp_path: Path) -> None:
    """Under torchrun each rank does the same parts."""
    runs = [tmp_path / name for name in ("whole", "parts")]
    path = write_config(tmp_path)
    for root, parts in zip(
        runs, ([[]], [["--only", "imp:tickets"], ["--only", "imp:random"]]), strict=True
    ):
        for only in parts:
            words = ["run", path, "--root", str(root), *only]
            assert tombola(*words, world_size=2) == [0, 0]
    assert_same_results(runs[1] / "tiny", runs[0] / "tiny")
    assert recorded(runs[1] / "tiny") == recorded(runs[0] / "tiny")


def test_parts_on_an_object_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each process writes its files whole, and reads those of the others."""
    root = f"memory://{tmp_path.name}"
    run = ["run", write_config(tmp_path), "--root", root]
    for only in (["--only", "imp:tickets"], ["--only", "imp:random"], []):
        assert run_command([*run, *only]) == 0
    capsys.readouterr()
    assert run_command(["tickets", "list", f"{root}/tiny", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5
    folder = Folder(f"{root}/tiny")
    facts = [folder.read(n) for n in folder.names() if n.startswith("metrics")]
    assert len(facts) == 3
    assert facts[2] == b"", "the last process found everything done"


def test_a_part_has_a_tensorboard_folder_of_its_own(tmp_path: Path) -> None:
    """Below the run's, so that one TensorBoard shows all."""
    run = ["run", write_config(tmp_path), "--root", str(tmp_path), "--stages.imp.rounds", "1"]
    trackers = ["--log.trackers", "tensorboard"]
    for part in ("tickets", "random"):
        assert run_command([*run, *trackers, "--only", f"imp:{part}"]) == 0
    folders = {path.parent.name for path in (tmp_path / "tiny/tensorboard").glob("*/events*")}
    assert folders == {"imp.tickets", "imp.random"}


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (["inp"], "--only inp: no stage named 'inp'; did you mean 'imp'? (stages: imp, "),
        (["imp:randon"], "no such part; did you mean 'random'? (parts: imp:tickets, imp:random, "),
        (["shallower:random"], "no such part (parts: shallower:tickets)"),
        (["imp", "imp:random"], "--only imp:random: is named twice"),
        (["grows:dense"], "no such part (parts: grows:tickets)"),
    ],
)
def test_a_wrong_part_is_one_clear_line(parts: list[str], told: str, tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, TREE + GROWS))
    with pytest.raises(UserError) as refused:
        units_of(config, parts)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            "deeper",
            "--only deeper:tickets: needs the tickets of stage 'imp', of which level 0, 1, 2",
        ),
        ("imp:random", "--only imp:random: needs the tickets of stage 'imp'"),
    ],
)
def test_a_part_waits_for_no_ticket(part: str, told: str, tmp_path: Path) -> None:
    """What it needs must be finished, all of it, before anything of it is written."""
    out = tmp_path / "out"
    words = ["run", write_config(tmp_path, TREE), "--root", str(tmp_path), "--only", part]
    assert tombola(*words, output=out) == [2]
    said = Path(f"{out}.0").read_text()
    assert told in said
    assert "run --only imp:tickets first" in said
    assert not (tmp_path / "tiny").exists()


def test_what_parts_are(tmp_path: Path) -> None:
    """Units in the order of the run, names of files, and stages with their controls alone."""
    config = read_config(write_config(tmp_path, TREE + GROWS))
    every = units_of(config)
    assert list(map(str, every)) == [
        "imp.tickets",
        "imp.random",
        "imp.reinit",
        "deeper.tickets",
        "deeper.random",
        "shallower.tickets",
        "grows.tickets",
    ]
    assert label(every, config) == ""
    assert label(units_of(config, ["shallower", "imp:reinit"]), config) == "imp.reinit+shallower"
    stages = stages_of([Unit("imp", "reinit"), Unit("grows", "tickets")], config)
    assert [(stage.name, stage.config.controls, dict(whole)) for stage, whole in stages] == [
        ("imp", ("reinit",), {"controls": ("random", "reinit")}),
        ("grows", ("dense",), {}),
    ]
    assert needs(config, Folder(tmp_path / "none")) == {
        "imp": (),
        "deeper": ("imp",),
        "shallower": ("imp",),
        "grows": (),
    }


def test_the_files_of_many_parts_have_names_that_a_disk_takes(tmp_path: Path) -> None:
    """Two sets of thirty stages with long names differ in the end alone."""
    stage = '[[stages]]\nname = "a-rather-long-name-of-a-stage-{}"\nrecipe = "imp"\n'
    text = TOML[: TOML.index("[[stages]]")] + "".join(map(stage.format, range(31)))
    config = read_config(write_config(tmp_path, text))
    names = [stage.name for stage in config.stages]
    labels = {label(units_of(config, names[:count]), config) for count in (29, 30)}
    assert len(labels) == 2
    for name in labels:
        (tmp_path / f"environment-{name}.json").touch()


def test_the_line_that_another_process_is_writing_is_no_damage(tmp_path: Path) -> None:
    """It is not read, and it stays."""
    folder = Folder(tmp_path)
    (tmp_path / "metrics-a.jsonl").write_text('{"event": "train", "step": 1}\n{"event": "tr')
    assert Journal.read(folder, "metrics-a.jsonl") == [{"event": "train", "step": 1}]
    recorder = Recorder(folder, part="b")
    recorder.record({"event": "train", "step": 1})
    recorder.record({"event": "train", "step": 2})
    recorder.close()
    assert (tmp_path / "metrics-a.jsonl").read_text().endswith('{"event": "tr')
    assert (tmp_path / "metrics-b.jsonl").read_text() == '{"event": "train", "step": 2}\n'


def test_a_promise_is_kept_by_all_levels(tmp_path: Path) -> None:
    """A stage is unfinished while any of its levels is."""
    from pruning.sources import unfinished

    (tmp_path / "imp/level-01").mkdir(parents=True)
    (tmp_path / "imp/level-01/ticket.json").write_text("{}")
    promise = Promise(dict.fromkeys([0, 1, 2], ModelConfig()))
    assert unfinished(Folder(tmp_path), "imp", promise) == [0, 2]
