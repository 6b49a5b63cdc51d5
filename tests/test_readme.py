"""What the README says can be typed: its commands, files and options exist."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from launch.cli import Command
from launch.config import read_config
from launch.grid import read_grid
from launch.parsing import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_the_first_screen_holds_the_two_commands() -> None:
    """One installs and runs the main job, one installs and passes the tests."""
    assert COMMANDS[:2] == [
        "pip install -e . && tombola run launch/configs/digits-imp.toml",
        'pip install -e ".[test]" && pytest -n 2',
    ]
    assert README.index(COMMANDS[1]) < 1200


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".toml" in c])
def test_a_command_of_the_readme_is_a_valid_run(command: str) -> None:
    """Its file exists, and its options are known: those of the command, and those of the run."""
    words = shlex.split(command.rpartition("&& ")[2])
    assert words[0] == "tombola"
    words = words[words.index("run") :] if words[1] == "launch" else words[1:]
    options = {"prog": "tombola", "config": (tyro.conf.OmitSubcommandPrefixes,)}
    given, overrides = parse(Command, words, return_unknown_args=True, **options)
    if words[0] == "sweep":
        assert len(read_grid(str(ROOT / given.config), overrides).runs) > 1
    else:
        assert read_config(str(ROOT / given.config), overrides).stages


def test_every_shipped_configuration_is_in_the_readme() -> None:
    for path in (ROOT / "launch/configs").glob("*.toml"):
        assert f"`{path.name}`" in README


def test_links_point_to_files() -> None:
    """... in the README and in docs/."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)
