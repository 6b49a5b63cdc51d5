"""The documentation does what it says: code runs, commands are known, links lead somewhere.

Every fenced block of the README and of docs/ is of a kind that a test takes: `python` runs, `toml`
is read as a configuration, a line of a shell that begins with `tombola` is parsed, and run where
it can be.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w
import tyro
from markdown_it import MarkdownIt
from processes import tombola

from launch.cli import Command, run_command
from launch.config import parse_document, read_config
from launch.grid import read_grid
from launch.parsing import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "api"} & set(page.relative_to(ROOT).parts)]
ELSEWHERE = {
    "docs/export.md": "test_export.py",
    "docs/extending.md": "test_extending.py",
    "docs/formats.md": "test_formats.py",
}
"""pages whose Python is run by tests of their own"""
_SHELL, _MARKUP = ("", "console", "sh"), "{toctree}"
_HERE = ("tickets", "report", "export")
"""commands that look at a finished run"""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


BLOCKS = [
    Block(str(page.relative_to(ROOT)), token.map[0] + 1, token.info.strip(), token.content)
    for page in PAGES
    for token in MarkdownIt().parse(page.read_text())
    if token.type == "fence" and token.map is not None
]


def of(*languages: str) -> list[Any]:
    return [pytest.param(block, id=block.id) for block in BLOCKS if block.language in languages]


def commands(block: Block) -> list[list[str]]:
    """The words of each `tombola` command of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = (part for line in lines for part in re.split(r"&&|\|", line))
    split = (
        shlex.split(part.removeprefix("$ "), comments=True) for part in parts if _is_command(part)
    )
    return [words[1:] for words in split]


def _is_command(line: str) -> bool:
    return line.strip().removeprefix("$ ").startswith("tombola ")


COMMANDS = [
    pytest.param(words, id=f"{block.id} {words[0]}")
    for block in BLOCKS
    if block.language in _SHELL
    for words in commands(block)
]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    known = {*_SHELL, "python", "toml", "json", _MARKUP}
    assert [block.id for block in BLOCKS if block.language not in known] == []
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text()


def test_symptoms_are_what_is_really_printed() -> None:
    """What docs/troubleshooting.md quotes stands in the code, or is what the system says."""
    files = (
        path
        for part in ("data", "train", "pruning", "launch")
        for path in (ROOT / part).rglob("*.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in files))
    page = (ROOT / "docs/troubleshooting.md").read_text()
    symptoms = re.findall(r"^\| (.*?) \|", page, re.M)
    quoted = [words for cell in symptoms for words in re.findall(r"`(.*?)`", cell)]
    assert len(quoted) > 20
    for words in quoted:
        for part in filter(None, re.split(r"\s*\.\.\.\s*", words)):
            known = {"No space left on device", "Bus error", "/dev/shm", "tombola tickets verify"}
            known |= {"train.compile", "you see"}
            told = re.sub(r"\{.*?\}", "", part)
            assert part in known or told.strip(":; ") in code, part


METHODS = sorted((ROOT / "docs/methods").glob("*.md"))


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_a_page_of_a_method_has_its_parts(page: Path) -> None:
    """What, when, how, what came of it here and in the paper, and what differs."""
    if page.stem == "comparison":
        return  # of all of them
    parts = re.findall(r"^## (.*)", page.read_text(), re.M)
    expected = {"When to use it", "What is done", "Configuration", "Measured", "In the paper"}
    assert expected | {"Where this differs"} <= set(parts)


# Commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_known(words: list[str]) -> None:
    """Its options too, and where it names a configuration of ours, the run's options."""
    if words[-1] == "--help" or (words[0] == "launch" and "run" not in words):
        return  # what torchrun takes is its own
    words = words[words.index("run") :] if words[0] == "launch" else words
    options = {"prog": "tombola", "config": (tyro.conf.OmitSubcommandPrefixes,)}
    if words[0] in ("run", "submit", "sweep"):
        given, overrides = parse(Command, words, return_unknown_args=True, **options)
        read = read_grid if words[0] == "sweep" else read_config
        if (ROOT / given.config).exists():
            assert read(str(ROOT / given.config), overrides)
    elif words != ["--version"]:
        parse(Command, words, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/digits-imp`, as the demo leaves it, but hardly trained."""
    folder = tmp_path_factory.mktemp("docs")
    short = ["--train.total", "4it", "--stages.imp.rewind", "1it", "--model.width", "2"]
    config = str(ROOT / "launch/configs/digits-imp.toml")
    assert tombola("run", config, *short, "--root", str(folder / "runs")) == [0]
    return folder


@pytest.fixture
def there(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(runs)
    return runs


LOOKING = [
    given
    for given in COMMANDS
    if given.values[0][0] in _HERE  # type: ignore[index]
    and "digits-imp" in " ".join(given.values[0])  # type: ignore[arg-type]
    and not re.search(
        r"://|\b[A-Z]{3,}\b|digits-(?!imp)|\blate\b|--barrier", " ".join(given.values[0])
    )  # type: ignore[arg-type]
]


@pytest.mark.parametrize("words", LOOKING)
def test_a_command_that_looks_at_the_demo_works(words: list[str], there: Path) -> None:
    assert run_command(words) == 0


# Code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of("toml"))
def test_a_configuration_is_valid(block: Block) -> None:
    """A part of one is completed: the shared sections with their defaults, a stage of IMP."""
    import tomllib

    document = tomllib.loads(block.text)
    document.setdefault("stages", [{"name": "imp", "recipe": "imp", "rounds": 1}])
    known = {**document, "name": "documented"}
    if block.page == "docs/extending.md":
        pytest.skip("has a score that tests/test_extending.py adds")
    assert parse_document(known, block.id).stages
    assert tomli_w.dumps(document)


PYTHON = dict.fromkeys(block.page for block in BLOCKS if block.language == "python")


@pytest.mark.parametrize("page", [page for page in PYTHON if page not in ELSEWHERE])
def test_the_code_of_a_page_runs(page: str, there: Path) -> None:
    """From the top to the bottom, in a folder with the run that it speaks of."""
    if "prize.mpt" in (ROOT / page).read_text() and not Path("prize.mpt").exists():
        made = str(ROOT / "launch/configs/digits-multiprize.toml")
        short = ["--train.total", "4it", "--model.width", "4", "--stages.mpt-1-1.density", "0.3"]
        assert tombola("run", made, *short, "--only", "mpt-1-1") == [0]
        ticket = "runs/digits-multiprize/mpt-1-1/level-00"
        assert run_command(["export", ticket, "--format", "mpt", "-o", "prize.mpt"]) == 0
    names: dict[str, Any] = {}
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            exec(compile("\n" * block.line + block.text, page, "exec"), names)


def test_every_public_name_says_what_it_gives() -> None:
    """What the API pages are made of: classes, functions, methods and properties of the library."""
    silent = []
    for path in (
        path for part in ("data", "train", "pruning") for path in (ROOT / part).glob("*.py")
    ):
        inside: list[tuple[str, ast.AST]] = [("", ast.parse(path.read_text()))]
        for prefix, node in inside:
            for one in getattr(node, "body", []):
                if isinstance(one, ast.FunctionDef | ast.ClassDef) and not one.name.startswith("_"):
                    silent += [] if ast.get_docstring(one) else [f"{path.name}: {prefix}{one.name}"]
                    inside += [(f"{one.name}.", one)] if isinstance(one, ast.ClassDef) else []
    assert silent == []


# The site --------------------------------------------------------------------------------


def test_links_are_well_formed() -> None:
    """Those that lead elsewhere; whether anything answers, `sphinx-build -b linkcheck` asks."""
    for page in PAGES:
        for url in re.findall(r"\]\((https?:[^)]*)\)", page.read_text()):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./~%#?=&+@:-]*)?", url), (page, url)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Pages, links between them and to headings, and the API from all docstrings."""
    words = ["-q", "-W", "--keep-going", "-j", "auto", "-b", "html", "-d", str(tmp_path / "trees")]
    site = subprocess.run(
        [sys.executable, "-m", "sphinx", *words, "docs", str(tmp_path / "html")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert site.returncode == 0, site.stderr
    index = (tmp_path / "html/index.html").read_text()
    for page in PAGES[2:]:
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert f'href="{name}"' in index or str(name) == "index.html", name
    ticket = (tmp_path / "html/api/pruning/pruning.tickets.html").read_text()
    assert "The network at <code" in ticket
