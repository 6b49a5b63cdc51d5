"""The examples of docs/examples, run as a user would: what they print is what the library says."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.arrays import digits
from launch.cli import run_command
from pruning.connectivity import STABLE, find_result
from pruning.cost import cost_of
from pruning.elastic import index_map, parse_map
from pruning.masks import Masks
from pruning.tickets import Ticket

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs/examples"
Table = list[dict[str, str]]


class Done:
    """An example that was run in its quick setting: what it printed, and its folder."""

    def __init__(self, printed: str, folder: Path) -> None:
        self.printed, self.folder = printed, folder

    def table(self, title: str) -> Table:
        """The rows of the table below a title, by their columns."""
        _, _, below = self.printed.partition(f"\n{title}")
        lines = [re.split(r"\s{2,}", line.strip()) for line in below.split("\n")[1:]]
        header, *rest = lines
        rows = []
        for line in rest:
            if len(line) != len(header):
                break
            rows.append(dict(zip(header, line, strict=True)))
        assert rows, title
        return rows

    def line(self, beginning: str) -> str:
        """What follows the beginning of a line, which is there once."""
        (found,) = re.findall(rf"^{re.escape(beginning)}(.*)$", self.printed, re.MULTILINE)
        return str(found)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Both, at once, each in an empty folder and from there."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    running = {}
    for name, folder in (("stable_ticket", "stable-ticket"), ("resnet_family", "resnet-family")):
        place = tmp_path_factory.mktemp(name)
        words = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick"]
        process = subprocess.Popen(
            words, cwd=place, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True
        )
        running[name] = process, place / folder / "quick"
    done = {}
    for name, (process, folder) in running.items():
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        done[name] = Done(printed, folder)
    return done


@pytest.fixture
def stable(examples: dict[str, Done]) -> Done:
    return examples["stable_ticket"]


@pytest.fixture
def family(examples: dict[str, Done]) -> Done:
    return examples["resnet_family"]


@pytest.mark.parametrize("name", ["stable_ticket", "resnet_family"])
def test_an_example_draws_its_picture(name: str, examples: dict[str, Done]) -> None:
    """... which the documentation shows, with what the full setting printed."""
    page = (ROOT / "docs/examples.md").read_text()
    assert f"(examples/{name}.png)" in page
    for path in (examples[name].folder / f"{name}.png", EXAMPLES / f"{name}.png"):
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.size == (950, 380)
            assert len(picture.convert("RGB").getcolors(950 * 380)) > 20


# ---- is my ticket stable?


def test_a_printed_barrier_is_that_of_the_line(stable: Done) -> None:
    """Of two seeds, two rewinding points and two levels; below 2 % on both sets it is stable."""
    rows = stable.table("Barriers")
    assert len(rows) == 8
    for row in rows:
        level = f"{row['stage']}/level-{int(row['level']):02d}"
        line = find_result(stable.folder / f"lines-of-{row['run']}" / level)
        ticket = Ticket.load(stable.folder / row["run"] / level)
        assert line is not None
        assert row["density"] == f"{ticket.density:.2%}"
        peaks = {
            s: max(c.errors) - (c.errors[0] + c.errors[-1]) / 2 for s, c in line.curves.items()
        }
        assert (row["on train"], row["on test"]) == (
            f"{peaks['train']:.2%}",
            f"{peaks['test']:.2%}",
        )
        assert row["stable"] == ("yes" if max(peaks.values()) < STABLE else "no")
    for stage in ("rewound-to-init", "rewound-to-5it"):
        here = [row for row in rows if row["stage"] == stage and row["level"] == "2"]
        num_stable = sum(row["stable"] == "yes" for row in here)
        assert f"{num_stable} of 2 at {here[0]['density']}" in stable.line(f"{stage}: stable ")


def test_the_report_measures_the_same_barrier_again(
    stable: Done, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the same two copies; and the barrier on interpolated statistics is another one."""
    place, _, rest = stable.printed.partition(": barrier on test images\n")
    run, _, level = place.rpartition("\n")[2].partition(", ")
    recalibrated, interpolated = re.findall(r"^ +([\d.]+%)  statistics", rest, re.MULTILINE)
    ends = [str(stable.folder / f"lines-of-{run}" / f"{level}-copy-{n}") for n in (1, 2)]
    how = ("--points", "4", "--num-batches", "4", "--json")
    for batchnorm, shown in (("recalibrate", recalibrated), ("interpolate", interpolated)):
        assert run_command(["report", *ends, "--barrier", "--batchnorm", batchnorm, *how]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert f"{found['barriers']['test']:.2%}" == shown
        assert found["same_start"]


def test_a_printed_accuracy_is_that_of_the_ticket(stable: Done) -> None:
    """Beside that of its random masks, and their means over what is stable and what is not."""
    rows, groups = stable.table("Test accuracy"), dict[str, list[tuple[float, float]]]()
    assert len(rows) == 4
    for row in rows:
        level = stable.folder / row["run"] / row["stage"] / f"level-{int(row['level']):02d}"
        ticket, random = (Ticket.load(f"{level}{control}") for control in ("", "-random"))
        assert random.parent == ticket.id
        gain = ticket.accuracy - random.accuracy
        assert (row["ticket"], row["random"]) == (
            f"{ticket.accuracy:.4f}",
            f"{random.accuracy:.4f}",
        )
        assert row["gain"] == f"{gain:+.4f}"
        groups.setdefault(row["stable"], []).append((ticket.accuracy, gain))
    for word, verdict in (("stable", "yes"), ("not stable", "no")):
        here = groups.get(verdict, [])
        told = stable.line(f"{word}, {len(here)} tickets")
        if here:
            reached, gained = (sum(values) / len(here) for values in zip(*here, strict=True))
            assert told == f": accuracy {reached:.4f}, over random masks {gained:+.4f}"


def test_a_printed_overlap_is_what_the_masks_have_in_common(stable: Done) -> None:
    """Of two seeds, and by chance: counted here bit by bit, layer by layer."""
    rows = {row["masks of"]: row for row in stable.table("Overlap of masks")}
    assert len(rows) == 4
    row = rows["other seed, rewound-to-5it"]
    one, other = (
        Ticket.load(stable.folder / f"seed-{seed}/rewound-to-5it/level-02").masks for seed in (0, 1)
    )
    common = union = expected = kept = 0.0
    for name, mask in one.items():
        common += int((mask & other[name]).sum())
        union += int((mask | other[name]).sum())
        expected += int(mask.sum()) * int(other[name].sum()) / mask.numel()
        kept += int(mask.sum()) + int(other[name].sum())
    chance = expected / (kept - expected)
    assert (row["IoU"], row["by chance"]) == (f"{common / union:.4f}", f"{chance:.4f}")
    assert row["ratio"] == f"{common / union / chance:.2f}"


def test_the_example_measures_a_run_that_is_there(
    stable: Done,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its own tickets are not trained, the run stays as it is, and its settings are kept."""
    run = stable.folder / "seed-1"
    before = (run / "metrics.jsonl").read_bytes()
    words = ["--quick", "--run", str(run / "rewound-to-5it"), "--levels", "1"]
    monkeypatch.setattr(sys, "argv", ["stable_ticket.py", *words, "--folder", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "stable_ticket.py"), run_name="__main__")
    (row,) = Done(capsys.readouterr().out, tmp_path).table("Barriers")
    assert (row["run"], row["stage"], row["level"]) == ("seed-1", "rewound-to-5it", "1")
    assert (run / "metrics.jsonl").read_bytes() == before
    (copy, _) = sorted(tmp_path.glob("quick/lines-of-seed-1-1/*/level-01-copy-?"))
    source, trained = Ticket.load(run / "rewound-to-5it/level-01"), Ticket.load(copy)
    assert trained.masks == source.masks
    assert trained.weights_digest == source.weights_digest
    for section in ("data", "train", "optimizer", "schedule"):
        assert trained.config["settings"][section] == source.config["settings"][section]


# ---- from one ResNet to a family


def tickets(family: Done, name: str) -> tuple[Ticket, Ticket]:
    """A member of the family, and its random masks."""
    level = family.folder / f"family/seed-0/{name}/level-01"
    return Ticket.load(level), Ticket.load(f"{level}-random")


def test_the_family_has_the_depths_and_the_maps_that_are_printed(family: Done) -> None:
    """Five depths, both orders where they differ, a map by hand, and stages of several depths."""
    found: dict[tuple[int, ...], list[str]] = {}
    for row in family.table("Cost")[1:]:
        ticket, _ = tickets(family, row["member"])
        assert row["map"] == ticket.config["map"]
        found.setdefault(tuple(ticket.model.arguments["blocks"]), []).append(row["map"])
    assert sorted(found) == [(1, 1, 1), (2, 2, 2), (2, 3, 5), (4, 4, 4), (5, 5, 5)]
    for blocks, maps in found.items():
        if len(set(blocks)) == 1:
            orders = {tuple(index_map(3, blocks[0], o)) for o in ("append", "interpolate")}
            by_hand = {(0, 2)} if blocks == (2, 2, 2) else set()
            assert {tuple(parse_map(one)[0]) for one in maps} == orders | by_hand


def test_a_printed_cost_is_counted_from_the_network(family: Done) -> None:
    for row in family.table("Cost"):
        ticket, _ = tickets(family, row["member"])
        parameters = sum(one.numel() for one in ticket.model.build().parameters())
        pruned = sum(int((~mask).sum()) for mask in ticket.masks.values())
        assert row["density"] == f"{ticket.density:.2%}"
        assert row["parameters"] == f"{parameters:,}"
        assert row["kept"] == f"{parameters - pruned:,}"
        assert row["bytes"] == f"{4 * parameters:,}"
        dense = cost_of(ticket.model, Masks.ones(ticket.model.build()), (1, 8, 8))
        assert row["FLOPs"] == f"{dense.flops:,}" == f"{dense.sparse_flops:,}"
        sparse = cost_of(ticket.model, ticket.masks, (1, 8, 8)).sparse_flops
        assert row["sparse FLOPs"] == f"{sparse:,}"
        assert sparse < dense.flops


def test_a_printed_accuracy_is_that_of_the_member(family: Done) -> None:
    """Beside random masks of the same density in each layer, and the same network dense."""
    gaps = []
    for row in family.table("Test accuracy"):
        ticket, random = tickets(family, row["member"])
        assert [one.kept for one in random.masks.table()] == [
            one.kept for one in ticket.masks.table()
        ]
        assert random.masks != ticket.masks
        blocks = "-".join(map(str, ticket.model.arguments.get("blocks", ())))
        stage = f"dense-{blocks}" if blocks else "source"
        dense = Ticket.load(family.folder / f"family/seed-0/{stage}/level-00")
        assert dense.density == 1
        shown = (row["ticket"], row["random"], row["dense"])
        assert shown == tuple(f"{one.accuracy:.4f}" for one in (ticket, random, dense))
        if row["member"] != "source":
            gaps.append(ticket.accuracy - random.accuracy)
    told = family.line("elastic tickets over random masks: ")
    above = sum(gap > 0 for gap in gaps)
    assert told == f"{sum(gaps) / len(gaps):+.4f} on the mean, above in {above} of {len(gaps)}"


def test_the_exported_member_runs_without_tombola(family: Done) -> None:
    """An isolated Python loads nothing of it, and classifies as many images as the ticket did."""
    member = family.line("plain torch: the member ")
    ticket, _ = tickets(family, member)
    assert family.line("loaded of tombola: ") == "[]"
    logits = load_file(family.folder / f"{member}.logits.safetensors")["logits"]
    labels = torch.from_numpy(digits("").test.labels)
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(ticket.accuracy)
    state: dict[str, Any] = load_file(family.folder / f"{member}.safetensors")
    for name, mask in ticket.masks.items():
        assert not state[name][~mask].any()
    assert (family.folder / f"{member}.onnx").stat().st_size > 4 * ticket.masks.kept
    assert float(family.line("onnxruntime: largest difference of a logit ")) < 1e-3


def test_the_program_that_runs_it_refuses_another_network(family: Done) -> None:
    """What it compares is no matter of course: without its last layer the file is not loaded."""
    namespace: dict[str, Any] = {}
    text = (family.folder / "plain.py").read_text()
    exec(compile(text[: text.index("torch.set_num_threads")], "plain.py", "exec"), namespace)
    member = family.line("plain torch: the member ")
    state = load_file(family.folder / f"{member}.safetensors")
    assert namespace["PlainResNet"](state)
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        namespace["PlainResNet"]({k: v for k, v in state.items() if k != "fc.bias"})
