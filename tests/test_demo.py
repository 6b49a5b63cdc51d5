"""The demo of the README: winning tickets in real images."""

import statistics
from pathlib import Path

from processes import tombola
from tiny import ticket_facts

CONFIG = Path(__file__).parent.parent / "launch/configs/digits-imp.toml"


def test_the_demo_finds_winning_tickets(tmp_path: Path) -> None:
    """Between 1 % and 3 % of the weights tickets stay near dense, and above random masks.

    One seed, whose three levels scatter; the README has the means over three seeds.
    """
    words = ["run", str(CONFIG), "--root", str(tmp_path)]
    assert tombola(*words, "--stages.imp.control_levels", "10", "11", "12") == [0]
    tickets = ticket_facts(tmp_path / "digits-imp")
    accuracy = {name: t["metrics"]["test"]["accuracy"] for name, t in tickets.items()}
    sparse = [name for name, t in tickets.items() if 0.01 < t["density"] < 0.03]
    found = statistics.mean(accuracy[name] for name in sparse if "random" not in name)
    random = statistics.mean(accuracy[name] for name in sparse if "random" in name)
    assert len(sparse) == 6
    assert accuracy["imp/level-00"] >= 0.975
    assert found >= accuracy["imp/level-00"] - 0.02
    assert found > random + 0.004
