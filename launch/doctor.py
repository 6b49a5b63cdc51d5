"""`tombola doctor`: what this machine can do, what would fail on it, and how to mend that."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.checkups import Finding, State, examine

_COLOURS: dict[State, str] = {"ok": "green", "note": "yellow", "fails": "red"}


def doctor(*, root: str, as_json: bool) -> bool:
    """Prints what is found; whether nothing fails."""
    if as_json:
        findings = list(examine(root))
        Console(soft_wrap=True).print_json(data=[asdict(finding) for finding in findings])
        return not any(finding.state == "fails" for finding in findings)
    console = Console(highlight=False)
    fails = 0
    for finding in examine(root):  # each is shown as soon as it is known
        fails += finding.state == "fails"
        console.print(_row(finding))
    console.print(f"{fails} of these would fail" if fails else "nothing here would fail")
    return not fails


def _row(finding: Finding) -> Table:
    """A finding in three columns, its remedy below."""
    row = Table.grid(padding=(0, 1))
    row.add_column(width=5)
    row.add_column(width=16)
    row.add_column()
    told = "\n".join(filter(None, (finding.found, finding.remedy)))
    row.add_row(Text(finding.state, _COLOURS[finding.state]), finding.what, Text(told))
    return row
