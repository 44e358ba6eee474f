"""Which network card the workers of a training speak over."""

from __future__ import annotations

import ipaddress
import os

import psutil
import ray


def speak_on_rays_network() -> None:
    """Run in a worker before it joins its process group: gloo and NCCL are to use the card of the node's Ray address.

    That address is known to be reached from the other nodes. Left alone, gloo takes whatever the machine's host name
    stands for, which on many machines is 127.0.0.1; other nodes' workers then wait there for themselves. What the
    environment says stays: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME.
    """
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if (name := interface_of(address)) is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if not ipaddress.ip_address(address).is_loopback:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # this very name, not all that begin with it


def interface_of(address: str) -> str | None:
    """The name of the card that has an address, such as eth0; None if none has."""
    wanted = ipaddress.ip_address(address)
    for name, held in psutil.net_if_addrs().items():
        for one in held:
            try:
                if ipaddress.ip_address(one.address.partition("%")[0]) == wanted:
                    return name
            except ValueError:  # the card's own number, not one of the network
                continue
    return None
