"""Controls as parts of their own, beside the tickets of every recipe that splits."""

import threading
from pathlib import Path

import pytest
from processes import tombola
from test_dual_runs import DUAL
from test_dynamic_runs import RIGL
from test_earlybird_runs import EB
from test_parts import assert_same_results, recorded
from tiny import TOML, write_config

BASE = TOML[: TOML.index("[[stages]]")].replace("3ep", "2ep")
INITIAL = """
[[stages]]
name = "init"
recipe = "initial"
score = "snip"
density = [0.2, 0.5]
at = "5it"
controls = ["random"]
"""
STAGES = {
    "eb": (EB, ["random"]),
    "dual": (DUAL, ["random", "budget"]),
    "init": (INITIAL, ["random"]),
    "moving": (RIGL + 'controls = ["static"]\n', ["static"]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_controls_beside_one_another_are_those_of_the_whole_run(stage: str, tmp_path: Path) -> None:
    """Ticket by ticket, weight by weight, fact by fact."""
    text, controls = STAGES[stage]
    runs = [tmp_path / name for name in ("whole", "parts")]
    for root in runs:
        root.mkdir()
    path = write_config(tmp_path, BASE + text)
    assert tombola("run", path, "--root", str(runs[0])) == [0]
    words = ["run", path, "--root", str(runs[1]), "--only"]
    assert tombola(*words, f"{stage}:tickets") == [0]
    codes: dict[str, list[int]] = {}

    def start(control: str) -> None:
        codes[control] = tombola(*words, f"{stage}:{control}")

    threads = [threading.Thread(target=start, args=[control]) for control in controls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {control: [0] for control in controls}
    assert_same_results(runs[1] / "tiny", runs[0] / "tiny")
    assert recorded(runs[1] / "tiny") == recorded(runs[0] / "tiny")
