"""What docs/extending.md says can be added is added as it says, and works."""

import re
from pathlib import Path
from typing import Any

import pytest
from family import run
from tiny import TOML

from pruning import scores
from pruning.allocate import keep_top
from pruning.tickets import Ticket

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
FUNCTION, LINE, TABLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(STAGE,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's code defines, its score added."""
    names: dict[str, Any] = {"Score": scores.Score}
    exec(compile(FUNCTION, "docs/extending.md", "exec"), names)
    exec(compile(TABLE, "docs/extending.md", "exec"), names)
    for name, score in eval(LINE, names).items():
        monkeypatch.setitem(scores.SCORES, name, score)
    return names


def test_the_truth_table_of_the_page_holds(page: dict[str, Any]) -> None:
    tables = [value for name, value in page.items() if name.startswith("test_")]
    assert len(tables) == 1
    tables[0]()


def test_a_run_prunes_by_the_score_of_the_page(page: dict[str, Any], tmp_path: Path) -> None:
    """At step k, by the function itself, over all layers."""
    folder = run(tmp_path, TOML[: TOML.index("[[stages]]")].replace("3ep", "16it") + STAGE)
    for level, density in enumerate((0.5, 0.1)):
        ticket = Ticket.load(folder / f"lamp/level-0{level}")
        assert ticket.method == "lamp"
        model = ticket.model.build()
        model.load_state_dict(ticket.weights())
        assert ticket.masks == keep_top(page["lamp"](model), density)
        assert (folder / f"lamp/level-0{level}-random/ticket.json").exists()
