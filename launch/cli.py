"""The `tombola` command.

Exit codes: 0 done; 2 the user's mistake, one line; 75 interrupted by SIGTERM or SIGUSR1, saved,
the same command goes on; 1 anything else.
"""

import errno
import os
import sys
import traceback
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, subcommand

from data.errors import Interrupted, RunError, UserError
from launch.export_commands import Export, ImportTicket
from launch.parsing import ParseError, parse
from launch.ticket_commands import (
    CollectGarbage,
    CopyTickets,
    DiffTickets,
    ListTickets,
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
    )

    def __call__(self) -> None:
        self.action()


@dataclass
class VerifyData:
    """Reads and decodes every image of a data set; exit code 1 if anything is wrong."""

    source: Positional[str]
    """folder or URL, whose kind is found out, or KIND:PATH"""
    allow: tuple[str, ...] = ()
    """kinds of findings that are no fault here: grayscale cmyk duplicate ..."""
    output: str = "verify.csv"
    """file that lists what is wrong"""
    workers: int | None = None
    """processes that decode (default: one a core)"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.verify import verify_data

        verify_data(
            self.source,
            allow=self.allow,
            output=self.output,
            num_workers=self.workers,
            as_json=self.json,
        )


@dataclass
class PackData:
    """Packs a data set of image files into WebDataset shards."""

    source: Positional[str]
    """folder or URL, whose kind is found out, or KIND:PATH"""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """folder or URL of the shards"""
    resize: int | None = None
    """re-encode larger images so that their shorter side is this long: 500, 256"""
    quality: int = 90
    """JPEG quality of what is re-encoded"""
    shard_size: int = 2048
    """images per shard"""
    workers: int | None = None
    """processes that encode (default: one a core)"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.pack import pack_data

        pack_data(
            self.source,
            output=self.output,
            resize=self.resize,
            quality=self.quality,
            shard_size=self.shard_size,
            num_workers=self.workers,
            as_json=self.json,
        )


@dataclass
class Data:
    """Data sets of image files: checks them, packs them."""

    action: Annotated[VerifyData, subcommand("verify")] | Annotated[PackData, subcommand("pack")]

    def __call__(self) -> None:
        self.action()


@dataclass
class Bench:
    """Measures this machine against a reference, both in one run, and prints the ratio."""

    benchmark: Positional[Literal["engine", "masks", "checkpoint", "store", "threshold", "loader"]]
    """engine: images/s through fit against a bare loop; masks: what a 5 % mask adds to a step;
    checkpoint: how long a save stops the training, asynchronous against synchronous;
    store: bytes and seconds of stored masks against torch.save;
    threshold: choosing the largest weights against a sort and others;
    loader: images/s of the training view of image files against other loaders"""
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
        return _fail(error, f"stopped; {_SAVED}", 1)
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
    from train.settings import Settings

    for title, kind, prog in (
        ("", Run, "tombola run"),
        ("\nThe sections of a configuration:\n", Settings, "tombola run CONFIG"),
        *(
            (
                f"\nA stage with recipe = {name!r}, its options as --stages.NAME.option:\n",
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


def _fail(error: BaseException, line: str, code: int) -> int:
    """Prints the one line; what rank 0 met and told the others, rank 0 prints alone."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(line, file=sys.stderr)
    elif not getattr(error, "met_by_all", False):
        print(f"[rank {rank}] {line}", file=sys.stderr)
    return code
