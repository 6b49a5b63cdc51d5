"""The words after `tombola bench` and `tombola doctor`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from data.errors import UserError
from launch.failures import EXIT_FAILED


@dataclass
class Bench:
    """Measures this machine against a reference, both in one run, and prints the ratio."""

    benchmark: Annotated[
        Positional[
            Literal[
                "engine",
                "masks",
                "allreduce",
                "checkpoint",
                "store",
                "threshold",
                "loader",
                "scores",
                "xnor",
                "semi-structured",
                "imp",
            ]
        ],
        tyro.conf.arg(metavar="NAME"),
    ]
    """engine: images/s through fit against a bare loop; masks: what a 5 % mask adds to a step;
    allreduce: summing gradients over links of several rates, those of pruned weights left out;
    checkpoint: how long a save stops the training, asynchronous against synchronous;
    store: bytes and seconds of stored masks against torch.save;
    threshold: choosing the largest weights against a sort and others;
    loader: images/s of the training view of image files against other loaders;
    scores: choosing weights once a step against a sort in every forward pass;
    xnor: convolutions on packed bits against float32;
    semi-structured: inference with 2:4 weights on NVIDIA's sparse tensor cores against dense;
    imp: a sweep of digits against a peer's design, and where a level's time goes"""
    root: str | None = None
    """loader: a folder with train/CLASS and val/CLASS to read; without it JPEGs made from sample
    photographs"""
    size: Literal["resnet50", "wide_resnet50_2", "1G"] | None = None
    """store, threshold: of these layers alone; 1G takes about 16 GiB; by default both ResNets"""
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


@dataclass
class Doctor:
    """Tries what runs need of this machine, and says how to mend what would fail; exit code 1 if
    anything would."""

    root: str = "runs"
    """folder or URL that would hold the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> int:
        from launch.doctor import doctor

        return 0 if doctor(root=self.root, as_json=self.json) else EXIT_FAILED
