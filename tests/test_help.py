"""The help of every command is readable in 80 columns, and a shell completes its words."""

import re
import shutil
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from launch.cli import Command, run_command
from launch.parsing import readable
from launch.recipes import RECIPES
from train.settings import Settings

ROOT = Path(__file__).parent.parent


def commands(union: Any = Command, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command, those of groups of commands too."""
    found = []
    for one in get_args(union):
        words = (*before, one.__metadata__[0].name)
        found.append(words)
        for part in fields(one.__origin__):
            if part.name == "action":
                found += commands(part.type, words)
    return found


COMMANDS = [words for words in commands() if words != ("launch",)]  # its options are torchrun's


def told(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        assert run_command([*words, "--help"]) == 0
    except SystemExit as leave:
        assert not leave.code  # noqa: PT017
    return capsys.readouterr().out


def options(text: str) -> dict[str, str]:
    """What is said of each option and word of a help."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        option = re.match(r"  (--?[a-z]\S*.*?|[A-Z][A-Z. ]*)(?:\s{2,}(.*))?$", line)
        if option:
            name = option[1]
            found[name] = option[2] or ""
        elif line.startswith("      ") and name:
            found[name] += " " + line.strip()
    return {name: words.strip() for name, words in found.items()}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_help_fits_into_80_columns(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """... says something of every option, and what it is by default where it has a value."""
    text = told(words, capsys)
    assert max(map(len, text.splitlines())) <= 80
    found = options(text)
    assert found
    for name, said in found.items():
        assert said, name
        assert not said.startswith("("), name
        assert said.count("(default:") <= 1, name
        assert "None" not in said, name


def test_the_help_of_run_has_every_section_and_every_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = told(("run",), capsys)
    for section in fields(Settings):
        if isinstance(section.default_factory, type) and is_dataclass(section.default_factory):
            for one in fields(section.default_factory):
                assert f"--{section.name}.{one.name.replace('_', '-')} " in text
    for name, recipe in RECIPES.items():
        assert f"recipe = {name!r}" in text
        for one in fields(recipe.config):
            assert f"--{one.name.replace('_', '-')}" in text


def test_texts_are_wrapped_beside_their_options() -> None:
    """What tyro breaks in the middle flows, and nothing stands for what is not set."""
    raw = (
        "usage: a b\n\n  --only X   one two\n             three (default: None)\n"
        "  --other    (default: )\n"
    )
    assert readable(raw) == "usage: a b\n\n  --only X   one two three\n  --other\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the script that the command prints, in a real bash."""
    assert run_command(["completion", "bash"]) == 0
    (tmp_path / "tombola.bash").write_text(capsys.readouterr().out)
    typed = {
        "ru": {"run"},
        "tickets s": {"show", "stages"},
        "report --ba": {"--barrier", "--batchnorm"},
        "run x.toml --train.prec": {"--train.precision"},
        "run x.toml --train.precision b": {"bf16"},
        "sweep x.toml --optimizer.l": {"--optimizer.lr"},
        "run x.toml --train.cuda": {"--train.cuda-graphs"},
    }
    lines = [
        f"COMP_WORDS=(tombola {words}); COMP_CWORD=$(({len(words.split())})); COMPREPLY=(); "
        "_tyro_tombola; echo ${COMPREPLY[*]}"
        for words in typed
    ]
    script = "\n".join(["source ./tombola.bash", "complete -p tombola >&2", *lines])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(typed.values())
    assert "tombola" in done.stderr


def test_zsh_has_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef tombola")
