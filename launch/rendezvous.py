"""Where the nodes of a run meet, and when a node gives up hearing from there."""

import contextlib
import os
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator

from data.errors import UserError

PORT = "29400"
_SETTINGS = {
    "last_call_timeout": "10",
    "keep_alive_interval": "3",
    "keep_alive_max_attempt": "3",
    "read_timeout": "120",
}
"""seconds, seconds, how often, seconds: a node that is gone is noticed in about ten seconds; one
that hears nothing from the node that hosts the rendezvous ends after two minutes"""
_PATIENCE = 300.0
"""seconds for the endpoint's name to become known: a cluster's names come with its nodes"""
_LOOK = 2.0
"""seconds between two looks for new connections"""


def set_up_rendezvous(options: Namespace) -> None:
    """Fills in torchrun's options for the endpoint that they name.

    Raises `UserError` without an endpoint, or for one whose name stays unknown.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    from train.network import address_towards, is_here

    if not options.rdzv_endpoint:
        raise UserError(
            f"--nnodes {options.nnodes} needs --rdzv-endpoint HOST:PORT: an address of one of the "
            "nodes, the same in the command of each"
        )
    try:
        host, port = parse_rendezvous_endpoint(options.rdzv_endpoint, int(PORT))
    except ValueError as error:
        raise UserError(f"--rdzv-endpoint {options.rdzv_endpoint}: {error}") from None
    options.rdzv_endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options.rdzv_backend, options.node_rank = "c10d", 0
    _await_name(host)
    own = address_towards(host)
    settings = dict(_SETTINGS)
    if own is not None and not own.startswith("127."):
        # torch compares names, and finds no host at all where an address has none.
        settings["is_host"] = str(is_here(host)).lower()
    elif host != "localhost" and not host.startswith("127."):
        own = None  # the machine calls itself so, as Debian's do: to others it has a name
    settings |= _numbers(_given(options.rdzv_conf))
    options.rdzv_conf = ",".join(f"{key}={value}" for key, value in settings.items())
    options.local_addr = options.local_addr or own


@contextlib.contextmanager
def bounded_silence(options: Namespace) -> Iterator[None]:
    """A context in which a silent link to the rendezvous becomes an error after `read_timeout`.

    torch waits for an answer of its store as long as the kernel repeats what is not acknowledged:
    a quarter of an hour, in which the agent sees nothing, not even that its ranks have ended.
    """
    seconds = _given(options.rdzv_conf or "").get("read_timeout")
    if seconds is None or not options.rdzv_endpoint:
        yield
        return
    port, ended = int(options.rdzv_endpoint.rpartition(":")[2]), threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK):
            _bound(port, int(float(seconds) * 1000))

    thread = threading.Thread(target=look, name="bounded_silence", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bound(port: int, milliseconds: int) -> None:
    """Has the kernel give up this process's connections to a port after a time without answer."""
    import psutil

    for connection in psutil.Process().net_connections("tcp"):
        if connection.fd < 0 or not connection.raddr or connection.raddr.port != port:
            continue
        with contextlib.suppress(OSError):  # closed meanwhile
            with socket.socket(fileno=os.dup(connection.fd)) as same:
                same.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _given(conf: str) -> dict[str, str]:
    """`--rdzv-conf` as a mapping."""
    pairs = (one.partition("=") for one in conf.split(",") if one.strip())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _numbers(given: dict[str, str]) -> dict[str, str]:
    """The same. Raises `UserError` where what torch takes for a number is none."""
    for key, value in given.items():
        if (key in _SETTINGS or key.endswith("_timeout")) and not value.isdecimal():
            raise UserError(f"--rdzv-conf {key}={value}: give a whole number, times in seconds")
    return given


def _await_name(host: str) -> None:
    """Returns once a host's name is known. Raises `UserError` where it stays unknown."""
    from train.network import resolved

    began = said = time.monotonic()
    while not resolved(host):
        now = time.monotonic()
        if now - began > _PATIENCE:
            raise UserError(
                f"--rdzv-endpoint {host}: no such host for {_PATIENCE:.0f} s: give the name or "
                "address of one of the nodes"
            )
        if now - said > 10:
            said = now
            print(f"waiting for the name {host}", file=sys.stderr, flush=True)
        time.sleep(1)
