"""The network interface by which this machine reaches another one."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

# gloo listens at what it is told here, and else at the address that the host's own name has. Debian
# and Ubuntu give that name a loopback address, at which no other machine finds it.
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_ROUTES = Path("/proc/net/route")
_ANY_PORT = 9


def own_address(host: str) -> str | None:
    """Return this machine's IPv4 address as ``host`` sees it; None without a route there."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
            unused.connect((host, _ANY_PORT))  # finds the route and sends nothing
            address: str = unused.getsockname()[0]
    except OSError:
        return None
    return address


def interface_towards(hosts: Sequence[str]) -> str | None:
    """Return the interface of the IPv4 route to the first of ``hosts`` that is no loopback address.

    An address of this machine itself has the interface of its network. None where nothing is known.
    """
    for host in hosts:
        with suppress(OSError):
            address = IPv4Address(socket.gethostbyname(host))
            if not address.is_loopback:
                return _interface_of_route(address)
    return None


def _interface_of_route(address: IPv4Address) -> str | None:
    routes = []
    for line in _ROUTES.read_text().splitlines()[1:]:
        name, target, _, _, _, _, metric, mask = line.split()[:8]
        network = IPv4Network((_number(target), _number(mask).bit_count()))
        if address in network:
            routes.append((network.prefixlen, -int(metric), name))
    # The narrowest network, then the smallest metric, as the system decides.
    return max(routes)[2] if routes else None


def _number(text: str) -> int:
    """Return an address of the route table, hexadecimal in this machine's order of bytes."""
    return socket.ntohl(int(text, 16))


def let_gloo_reach(hosts: Sequence[str]) -> None:
    """Have gloo use the interface of the route to ``hosts``, unless the user has named one."""
    if GLOO_INTERFACE not in os.environ and (name := interface_towards(hosts)):
        os.environ[GLOO_INTERFACE] = name
