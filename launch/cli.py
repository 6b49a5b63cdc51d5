"""The `tombola` command.

Exit codes: 0 done; 2 the user's mistake, one line; 75 interrupted by SIGTERM or SIGUSR1, saved,
the same command goes on; 1 anything else.
"""

import errno
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, subcommand

from data.errors import Interrupted, RunError, UserError
from launch.data_commands import Data
from launch.export_commands import Export, ImportTicket
from launch.parsing import ParseError, parse
from launch.ticket_commands import (
    CollectGarbage,
    CopyTickets,
    DiffTickets,
    ListTickets,
    ShowStages,
    ShowTicket,
    VerifyTickets,
)

EXIT_INTERRUPTED = 75
_ENVIRONMENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
}
_SAVED = "the same command goes on from what was saved"


@dataclass
class Run:
    """Runs a configuration, or what is left of it; --section.key value overrides the file."""

    config: Positional[str]
    """a TOML file"""
    root: str = "runs"
    """folder or URL that holds the runs"""

    def __call__(self, overrides: list[str]) -> None:
        from launch.run import run

        run(self.config, overrides, root=self.root)


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

    places: Positional[tuple[str, ...]]
    """runs: paths, URLs, or names under --root; with --barrier two of them, or RUN/STAGE/LEVEL"""
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
    """with --barrier: evaluate this many training images, spread evenly (default: all)"""
    data_root: str | None = None
    """with --barrier: where the data are now (default: where the run had them)"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.report import report_barrier, report_runs
        from pruning.connectivity import Line

        try:
            line = Line(self.points, self.batchnorm, self.num_batches, self.train_images)
        except ValueError as error:
            raise UserError(f"--{str(error).replace('_', '-')}") from None
        if self.barrier and self.compare:
            raise UserError("--compare and --barrier: choose one")
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
        else:
            report_runs(self.places, compare=self.compare, root=self.root, as_json=self.json)


@dataclass
class Bench:
    """Measures this machine against a reference, both in one run, and prints the ratio."""

    benchmark: Positional[
        Literal["engine", "masks", "checkpoint", "store", "threshold", "loader", "scores", "xnor"]
    ]
    """engine: images/s through fit against a bare loop; masks: what a 5 % mask adds to a step;
    checkpoint: how long a save stops the training, asynchronous against synchronous;
    store: bytes and seconds of stored masks against torch.save;
    threshold: choosing the largest weights against a sort and others;
    loader: images/s of the training view of image files against other loaders;
    scores: choosing weights once a step against a sort in every forward pass;
    xnor: convolutions on packed bits against float32"""
    root: str | None = None
    """loader: a folder with train/CLASS and val/CLASS to read (default: JPEGs made from sample
    photographs)"""
    size: Literal["resnet50", "wide_resnet50_2", "1G"] | None = None
    """store, threshold: of these layers alone; 1G takes about 16 GiB (default: both ResNets)"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.bench import BENCHMARKS

        if self.root is not None and self.benchmark != "loader":
            raise UserError(f"--root: {self.benchmark} reads no images; only loader does")
        if self.size is not None and self.benchmark not in ("store", "threshold"):
            raise UserError(f"--size: {self.benchmark} has one size; store and threshold have more")
        chosen = {"root": self.root, "size": self.size}
        options = {name: value for name, value in chosen.items() if value is not None}
        BENCHMARKS[self.benchmark](as_json=self.json, **options)


Command = (
    Annotated[Run, subcommand("run")]
    | Annotated[Tickets, subcommand("tickets")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Bench, subcommand("bench")]
)


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    code = run_command(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # other ranks may be waiting in a collective: do not wait for them
    sys.exit(code)


def run_command(words: list[str]) -> int:
    """Runs one command and returns its exit code; errors are one line on stderr."""
    try:
        _dispatch(words)
    except UserError as error:
        return _fail(error, f"error: {error}", 2)
    except RunError as error:
        return _fail(error, f"error: {error}", 1)
    except Interrupted as error:
        return _fail(error, f"interrupted: {error}; {_SAVED}", EXIT_INTERRUPTED)
    except KeyboardInterrupt as error:
        return _fail(error, f"stopped; {_SAVED}" if words[:1] == ["run"] else "stopped", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `tombola ... | head`
        return 1
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            traceback.print_exc()
            return 1
        where = f": {error.filename}" if error.filename else ""
        advice = f"; mend it, and {_SAVED}" if words[:1] == ["run"] else ""
        return _fail(error, f"error: {error.strerror}{where}{advice}", 1)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _dispatch(words: list[str]) -> None:
    if not words:
        words = ["--help"]
    if words == ["--version"]:
        print(f"tombola {metadata.version('tombola')}")
        return
    if words[0] == "run" and {"-h", "--help"} & set(words):
        _print_run_help()
        return
    options = {"prog": "tombola", "config": (tyro.conf.OmitSubcommandPrefixes,)}
    try:
        if words[0] == "run":
            command, overrides = parse(Command, words, return_unknown_args=True, **options)
            command(overrides)
        else:
            parse(Command, words, **options)()
    except ParseError as error:
        advice = "; give CONFIG before its options" if words[0] == "run" and words[1:] else ""
        raise UserError(f"{error}{advice} (see tombola --help)") from None


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
            print(title)
        try:
            parse(kind, ["--help"], prog=prog, add_help=True, config=(tyro.conf.FlagConversionOff,))
        except SystemExit:
            continue


def _defaults_of(defaults: Mapping[str, str]) -> str:
    told = ", ".join(f"{key} = {value}" for key, value in defaults.items())
    return f" (with {told}, each unless something in its section is set)" if told else ""


def _fail(error: BaseException, line: str, code: int) -> int:
    """Prints the one line; what rank 0 met and told the others, rank 0 prints alone."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(line, file=sys.stderr)
    elif not getattr(error, "met_by_all", False):
        print(f"[rank {rank}] {line}", file=sys.stderr)
    return code
