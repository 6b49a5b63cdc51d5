"""Every mistake of docs/common-mistakes.md gets the very line that stands there, and no other."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from launch.cli import run_command

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/common-mistakes.md").read_text()
CONFIG = ROOT / "launch/configs/digits-imp.toml"
LINE, FILE, STAGE, OTHER = re.split(r"^## In the file|^As a further|^## Other", PAGE, flags=re.M)


def rows(part: str) -> list[tuple[str, ...]]:
    """The cells of a table, without the marks of code."""
    found = re.findall(r"^\| (.*) \|$", part, re.M)[1:]
    cells = (re.split(r" (?<!\\)\| ", row) for row in found)
    return [tuple(c.strip("`").replace("\\|", "|") for c in one) for one in cells]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(CONFIG, tmp_path / "mine.toml"))


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with 2, and writes nothing else."""
    capsys.readouterr()
    assert run_command(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err[len("error: ") : -1]


@pytest.mark.parametrize(("written", "line"), rows(LINE))
def test_on_the_command_line(
    written: str, line: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(["run", "mine.toml", *shlex.split(written)], capsys) == line


@pytest.mark.parametrize(("instead", "written", "line"), rows(FILE))
def test_in_the_file(
    instead: str, written: str, line: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = mine.read_text()
    assert instead in text
    mine.write_text(text.replace(instead, written.replace("; ", "\n"), 1))
    assert told(["run", "mine.toml"], capsys) == line


@pytest.mark.parametrize(("written", "line"), rows(STAGE))
def test_as_a_further_stage(
    written: str, line: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.write_text(f"{mine.read_text()}\n[[stages]]\n" + written.replace("; ", "\n"))
    assert told(["run", "mine.toml"], capsys) == line


@pytest.mark.parametrize(("written", "line"), rows(OTHER))
def test_of_other_commands(
    written: str, line: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(shlex.split(written)[1:], capsys) == line


def test_the_list_is_long() -> None:
    assert len(rows(LINE)) + len(rows(FILE)) + len(rows(STAGE)) + len(rows(OTHER)) > 60
