"""The words after `tombola tickets`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional


@dataclass
class ListTickets:
    """Lists the finished tickets of a run, or those of a store."""

    place: Annotated[Positional[str], tyro.conf.arg(metavar="PLACE")]
    """a run or a store: path, URL, or name under --root"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.tickets import list_tickets

        list_tickets(self.place, root=self.root, as_json=self.json)


@dataclass
class ShowTicket:
    """Shows a ticket: lineage, metrics, density of each layer."""

    place: Annotated[Positional[str], tyro.conf.arg(metavar="PLACE")]
    """RUN/STAGE/LEVEL, STORE/ID, or a run or a store"""
    ticket: Annotated[Positional[str | None], tyro.conf.arg(metavar="TICKET")] = None
    """of a run or a store: level-07, imp/level-07, or the beginning of an id; by default the
    sparsest of a run"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.tickets import show_ticket

        show_ticket(self.place, self.ticket, root=self.root, as_json=self.json)


@dataclass
class VerifyTickets:
    """Recomputes every digest, count and shape of tickets; exit code 1 if anything is wrong.

    Of a file of a multi-prize ticket (.mpt) also the logits, and, if its activations are binary,
    that it gives the same ones when it runs as bits.
    """

    places: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PLACE ...")]
    """tickets, runs, stores or .mpt files: paths, URLs, or names under --root"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.store import verify_tickets

        verify_tickets(self.places, root=self.root, as_json=self.json)


@dataclass
class CopyTickets:
    """Copies a ticket, or all of a run or a store, into a store."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """a ticket, a run or a store: path, URL, or name under --root"""
    target: Annotated[Positional[str], tyro.conf.arg(metavar="STORE")]
    """folder or URL of the store; made if it is not there"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.store import copy_tickets

        copy_tickets(self.source, self.target, root=self.root, as_json=self.json)


@dataclass
class DiffTickets:
    """Shows, layer by layer, how far the masks of two tickets agree."""

    first: Annotated[Positional[str], tyro.conf.arg(metavar="TICKET")]
    """a ticket: RUN/STAGE/LEVEL or STORE/ID; of a run the sparsest"""
    second: Annotated[Positional[str], tyro.conf.arg(metavar="TICKET")]
    """the ticket that it is compared with"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.store import diff_tickets

        diff_tickets(self.first, self.second, root=self.root, as_json=self.json)


@dataclass
class CollectGarbage:
    """Removes objects that no ticket names: what interrupted runs and copies left."""

    place: Annotated[Positional[str], tyro.conf.arg(metavar="PLACE")]
    """a run or a store: path, URL, or name under --root"""
    hours: float = 24.0
    """only what is older: younger objects may belong to a ticket that is being written"""
    dry_run: bool = False
    """remove nothing, only show"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.store import collect_garbage

        collect_garbage(
            self.place,
            hours=self.hours,
            dry_run=self.dry_run,
            root=self.root,
            as_json=self.json,
        )


@dataclass
class ShowStages:
    """Lists a model's stages (lists of like blocks), and which go where in another depth."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """any timm model, cifar_resnet{6n+2}, cifar_resnet18/34, cifar_vgg{11,13,16,19} or
    cifar_vgg_small"""
    to: str | None = None
    """the model that its tickets shall be stretched or squeezed to: prints the map"""
    order: Literal["append", "interpolate"] = "append"
    """append repeats blocks as a group, interpolate each in place"""
    json: bool = False
    """print one JSON document"""

    def __call__(self) -> None:
        from launch.stages import show_stages

        show_stages(self.model, to=self.to, order=self.order, as_json=self.json)
