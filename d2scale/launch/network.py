"""The network interface by which this machine reaches another one."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

# gloo listens at what it is told here, and else at the address that the host's own name has. Debian
# and Ubuntu give that name a loopback address, at which no other machine finds it. NCCL takes the
# first interface that it finds, perhaps one of containers; "=" is for exactly this name.
_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
_ROUTES = Path("/proc/net/route")
_ANY_PORT = 9
_CONNECT_SECONDS = 3.0


def reason_against(address: tuple[str, int]) -> str | None:
    """Return why nobody answers at ``address``, a host and a port; None if somebody does."""
    try:
        socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def reason_against_serving(address: tuple[str, int]) -> str | None:
    """Return why this machine cannot be the one at ``address``, a host and a port; None if it can.

    torch would print frames of C++.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    place = ("", address[1])
    try:
        with socket.create_server(place, family=family, dualstack_ipv6=both) as server:
            server.settimeout(_CONNECT_SECONDS)
            if reason := reason_against(address):
                return reason
            server.accept()[0].close()
    except TimeoutError:
        return "another machine answers there"
    except OSError as error:
        return error.strerror or str(error)
    return None


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


def use_route_to(hosts: Sequence[str]) -> None:
    """Have gloo and NCCL use the interface of the route to ``hosts``, unless the user named one."""
    if name := interface_towards(hosts):
        for variable, prefix in _VARIABLES.items():
            os.environ.setdefault(variable, prefix + name)
