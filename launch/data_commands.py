"""The words after `tombola data`."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional, subcommand


@dataclass
class VerifyData:
    """Reads and decodes every image of a data set; exit code 1 if anything is wrong."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """folder or URL, whose kind is found out, or KIND:PATH"""
    allow: tuple[str, ...] = ()
    """kinds of findings that are no fault here: grayscale cmyk duplicate ..."""
    output: str = "verify.csv"
    """file that lists what is wrong"""
    workers: int | None = None
    """processes that decode; by default one a core"""
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

    source: Annotated[Positional[str], tyro.conf.arg(metavar="SOURCE")]
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
    """processes that encode; by default one a core"""
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
