"""Which of this machine's network interfaces leads to another machine."""

import os
import socket
from typing import Any

import psutil

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def choose_interface() -> None:
    """Has gloo use the interface that leads to the first rank, unless the user chose one.

    Left alone, gloo takes the address that the host's own name resolves to: on many machines the
    loopback, which no other node reaches. NCCL finds its interfaces by itself.
    """
    first = os.environ.get("MASTER_ADDR")
    if first is None or GLOO_INTERFACE in os.environ:
        return
    address = address_towards(first)
    interface = None if address is None else _interface_with(address)
    if interface is not None:
        os.environ[GLOO_INTERFACE] = interface


def address_towards(host: str) -> str | None:
    """The address of this machine on the way to `host`; `None` where there is no way."""
    for family, target in resolved(host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(target)  # of datagrams: asks the routing table, and sends nothing
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return None


def is_here(host: str) -> bool:
    """Whether a host name or address is one of this machine's own."""
    own = {address.address for found in psutil.net_if_addrs().values() for address in found}
    return any(str(target[0]) in own for _, target in resolved(host))


def resolved(host: str) -> list[tuple[socket.AddressFamily, Any]]:
    """The families and addresses of a host; none where its name is not known."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return [(family, address) for family, *_, address in found]


def _interface_with(address: str) -> str | None:
    """The name of the interface that has an address."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return str(name)
    return None
