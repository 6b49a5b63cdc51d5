"""The `tombola` command.

Exit codes: 0 done; 2 the user's mistake, one line; 75 interrupted by SIGTERM or SIGUSR1, saved,
the same command goes on; 1 anything else.
"""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from importlib import metadata
from textwrap import fill
from typing import Annotated, Any, Literal, Union, get_args

import tyro
from tyro.conf import Positional, subcommand

from data.errors import UserError
from launch.agent import RESUMING, die_with_agent, tell_agent
from launch.data_commands import Data
from launch.export_commands import Export, ImportTicket
from launch.failures import EXIT_FAILED, fail
from launch.machine_commands import Bench, Doctor
from launch.parsing import ParseError, parse
from launch.run_commands import Run, Sweep, Watch
from launch.submit import options
from launch.ticket_commands import (
    CollectGarbage,
    CopyTickets,
    DiffTickets,
    ListTickets,
    ShowStages,
    ShowTicket,
    VerifyTickets,
)


@dataclass
class Launch:
    """Runs a configuration on all GPUs of this node, or on several nodes: torchrun, with settings
    under which a run outlives its nodes."""

    words: Positional[tuple[str, ...]]
    """options of torchrun, then run CONFIG and its options (see tombola launch --help)"""

    def __call__(self) -> int:
        from launch.agent import launch

        return launch(self.words)


@dataclass
class Tickets:
    """Tickets, of a run or in a store."""

    action: (
        Annotated[ListTickets, subcommand("list")]
        | Annotated[ShowTicket, subcommand("show")]
        | Annotated[VerifyTickets, subcommand("verify")]
        | Annotated[CopyTickets, subcommand("copy")]
        | Annotated[DiffTickets, subcommand("diff")]
        | Annotated[CollectGarbage, subcommand("gc")]
        | Annotated[ImportTicket, subcommand("import")]
        | Annotated[ShowStages, subcommand("stages")]
    )

    def __call__(self) -> None:
        self.action()


@dataclass
class Report:
    """Tables of runs: levels, controls, elastic tickets beside IMP's, error barriers; of a run over
    several seeds all methods at the same densities."""

    places: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")]
    """runs: paths, URLs, or names under --root; with --barrier two of them, or RUN/STAGE/LEVEL"""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """write a page about all these runs there, an HTML file that needs nothing else: figures,
    lineage of the tickets, methods, settings, machines"""
    csv: str | None = None
    """with -o: also write the numbers of its figures and tables into this folder, as CSV files"""
    compare: bool = False
    """one table of all these runs: what each method reached at like densities, mean and spread"""
    barrier: bool = False
    """measure the error between what two runs were trained to, level by level"""
    levels: tuple[int, ...] = ()
    """with --barrier: only these levels"""
    points: int = 30
    """with --barrier: of the line, both ends included"""
    batchnorm: Literal["recalibrate", "interpolate"] = "recalibrate"
    """with --barrier: take statistics anew from training batches, or interpolate them"""
    num_batches: int = 16
    """with --barrier: global training batches to recalibrate on, at each point"""
    train_images: int | None = None
    """with --barrier: evaluate this many training images, spread evenly; by default all"""
    data_root: str | None = None
    """with --barrier: where the data are now; by default where the run had them"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.report import report_barrier, report_page, report_runs
        from pruning.connectivity import Line

        try:
            line = Line(self.points, self.batchnorm, self.num_batches, self.train_images)
        except ValueError as error:
            raise UserError(f"--{str(error).replace('_', '-')}") from None
        chosen = {"--compare": self.compare, "--barrier": self.barrier, "-o": bool(self.output)}
        if sum(chosen.values()) > 1:
            raise UserError(f"{' and '.join(k for k, v in chosen.items() if v)}: choose one")
        if self.barrier:
            report_barrier(
                self.places,
                levels=self.levels,
                line=line,
                data_root=self.data_root,
                root=self.root,
                as_json=self.json,
            )
        elif self.levels or self.data_root is not None or line != Line():
            raise UserError("--levels, --points and their like go with --barrier")
        elif self.csv is not None and self.output is None:
            raise UserError("--csv: goes with -o FILE, which makes the figures")
        elif self.output is not None:
            report_page(self.places, output=self.output, csv=self.csv, root=self.root)
        else:
            report_runs(self.places, compare=self.compare, root=self.root, as_json=self.json)


@dataclass(frozen=True)
class Submit(options.Submit):
    """Writes the files that start a run on a cluster, and hands them over; --section.key value
    overrides the configuration."""

    def __call__(self, overrides: list[str]) -> None:
        from launch.submit.submitting import submit

        self.check()
        submit(self, overrides)


@dataclass
class Completion:
    """Prints a script by which a shell completes commands and options: source <(tombola completion
    bash)"""

    shell: Annotated[Positional[Literal["bash", "zsh"]], tyro.conf.arg(metavar="SHELL")]
    """bash or zsh"""

    def __call__(self) -> None:
        print_completion(self.shell)


Command = (
    Annotated[Run, subcommand("run")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Watch, subcommand("watch")]
    | Annotated[Launch, subcommand("launch")]
    | Annotated[Tickets, subcommand("tickets")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Submit, subcommand("submit")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Completion, subcommand("completion")]
)


_CONFIGURED = (*RESUMING, "submit")
"""the commands with a CONFIG, whose options override it"""
_HOW: dict[str, Any] = {"prog": "tombola", "config": (tyro.conf.OmitSubcommandPrefixes,)}
"""the command line is parsed"""


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    code = run_command(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Other ranks may be waiting in a collective: do not wait for them. And gloo's threads may
        # hold Python objects, which aborts the process as the interpreter ends.
        os._exit(code)
    sys.exit(code)


def run_command(words: list[str]) -> int:
    """Runs one command and returns its exit code; errors are one line on stderr."""
    resumes = bool(words) and words[0] in RESUMING
    if resumes:
        die_with_agent()
    try:
        return _dispatch(words)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `tombola ... | head`
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        code = fail(error, resumes=resumes)
        if resumes:
            tell_agent(code, was_signalled=getattr(error, "was_signalled", False))
        return code


def _dispatch(words: list[str]) -> int:
    """Runs one command; its exit code. Raises what hinders it."""
    if not words:
        words = ["--help"]
    if words[0] == "launch":
        return Launch(tuple(words[1:]))()  # the options are torchrun's, which its parser reads
    if words == ["--version"]:
        print(f"tombola {metadata.version('tombola')}")
        return 0
    if words[0] == "run" and {"-h", "--help"} & set(words):
        _print_run_help()
        return 0
    try:
        if words[0] in _CONFIGURED:
            command, overrides = parse(Command, words, return_unknown_args=True, **_HOW)
            command(overrides)
        else:
            return parse(Command, words, **_HOW)() or 0
    except ParseError as error:
        options_follow = words[0] in _CONFIGURED and words[1:]
        advice = "; give CONFIG before its options" if options_follow else ""
        raise UserError(f"{error}{advice} (see tombola --help)") from None
    return 0


def print_completion(shell: str) -> None:
    """The script for a shell, with the sections of a configuration behind `run` and `sweep`."""
    commands = [
        Annotated[_with_sections(one.__origin__), *one.__metadata__] for one in get_args(Command)
    ]
    script = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(script):
        tyro.cli(Union[tuple(commands)], args=["--tyro-print-completion", shell], **_HOW)  # type: ignore[call-overload]  # noqa: UP007
    for line in script.getvalue().splitlines():
        if line.startswith("COMPLETION_SPEC"):  # a shell takes each line of a text for an option
            line = line.replace("\\n", " ")
        print(line)


def _with_sections(kind: type) -> type:
    """A command that takes what is the configuration's, with these options as its own."""
    from train.settings import Settings

    if kind not in (Run, Sweep):
        return kind
    options = [
        (one.name, one.type, field(default=one.default, default_factory=one.default_factory))
        for one in (*fields(kind), *fields(Settings))
    ]
    return make_dataclass(kind.__name__, options)


def _print_run_help() -> None:
    """The options of the command, of every section and of every recipe."""
    from launch.recipes import RECIPES
    from launch.sweep import SweepConfig
    from train.settings import Settings

    for title, kind, prog in (
        ("", Run, "tombola run"),
        ("\nThe sections of a configuration:\n", Settings, "tombola run CONFIG"),
        ("\nAt its top, in place of seed:\n", SweepConfig, ""),
        *(
            (
                f"\nA stage with recipe = {name!r}, its options as --stages.NAME.option"
                f"{_defaults_of(r.defaults)}:\n",
                r.config,
                "",
            )
            for name, r in RECIPES.items()
        ),
    ):
        if title:
            print(fill(title, shutil.get_terminal_size().columns, replace_whitespace=False))
        try:
            parse(kind, ["--help"], prog=prog, add_help=True, config=(tyro.conf.FlagConversionOff,))
        except SystemExit:
            continue


def _defaults_of(defaults: Mapping[str, str]) -> str:
    told = ", ".join(f"{key} = {value}" for key, value in defaults.items())
    return f" (with {told}, each unless something in its section is set)" if told else ""
