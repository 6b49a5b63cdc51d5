"""What docs/extending.md says can be added is added as it says, and works."""

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family import run
from tiny import TOML, assert_same_run

from data import arrays
from launch import recipes
from pruning import scores
from pruning.allocate import keep_top
from pruning.tickets import Ticket

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
SCORE, DATA, RECIPE, _ = (
    PAGE[start:]
    for start in (PAGE.index(f"\n## {title}") for title in ("A score", "A data", "A rec", "Other"))
)
SCORE, DATA = SCORE[: SCORE.index("\n## A data")], DATA[: DATA.index("\n## A recipe")]
HEAD = TOML[: TOML.index("[[stages]]")].replace("3ep", "16it")


def code_of(chapter: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)


def toml_of(chapter: str) -> str:
    (found,) = re.findall(r"```toml\n(.*?)```", chapter, re.DOTALL)
    return str(found)


def names_of(chapter: str, known: dict[str, Any], table: dict[str, Any], patch: Any) -> Any:
    """The names that a chapter's code defines, its line added to the table for this test."""
    code, line, test = code_of(chapter)
    names = dict(known)
    for text in (code, test):
        exec(compile(text, "docs/extending.md", "exec"), names)
    for name, value in eval(line, names).items():
        patch.setitem(table, name, value)
    return names


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Any:
    return names_of(SCORE, {"Score": scores.Score}, scores.SCORES, monkeypatch)


def test_the_truth_table_of_the_score_holds(score: dict[str, Any]) -> None:
    score["test_lamp_by_hand"]()


def test_a_run_prunes_by_the_score(score: dict[str, Any], tmp_path: Path) -> None:
    """At step k, by the function itself, over all layers."""
    folder = run(tmp_path, HEAD + toml_of(SCORE))
    for level, density in enumerate((0.5, 0.1)):
        ticket = Ticket.load(folder / f"lamp/level-0{level}")
        assert ticket.method == "lamp"
        model = ticket.model.build()
        model.load_state_dict(ticket.weights())
        assert ticket.masks == keep_top(score["lamp"](model), density)
        assert (folder / f"lamp/level-0{level}-random/ticket.json").exists()


def test_a_run_reads_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own test passes; a run takes it by its name, and `data verify` knows it."""
    from launch.cli import run_command

    names = names_of(DATA, {}, arrays.READERS, monkeypatch)
    names["test_medmnist_is_read"](tmp_path)
    data = tomllib.loads(toml_of(DATA))["data"]
    assert data["source"] == "medmnist"
    place = str(tmp_path / "grey.npz")
    words = ("--data.source", data["source"], "--data.root", place, "--data.batch_size", "16")
    folder = run(tmp_path, TOML.replace("3ep", "8it"), *words)
    ticket = Ticket.load(folder / "imp/level-01")
    assert ticket.model.num_classes == 3
    assert ticket.config["image_shape"] == [1, 9, 8]
    assert run_command(["data", "verify", f"medmnist:{place}"]) in (0, 1)
    assert "70 images" in capsys.readouterr().out
    assert np.load(place)["train_images"].shape == (40, 9, 8)


def test_a_run_by_the_recipe_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own test passes; a ticket whose training was cut off is trained on, to the same bits."""
    names = names_of(RECIPE, {"Recipe": recipes.Recipe, "Path": Path}, recipes.RECIPES, monkeypatch)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    folder = run(whole, HEAD + toml_of(RECIPE))
    names["test_the_largest_final_weights_go_back"](folder)
    shutil.copytree(whole, cut)
    level = cut / "tiny/oneshot/level-02"
    (level / "ticket.json").unlink()
    shutil.rmtree(max(level.glob("checkpoints/step-*")))
    journal = cut / "tiny/metrics.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-3]))
    again = run(cut, HEAD + toml_of(RECIPE))
    assert_same_run(folder, again)
