"""Machines of their own on one machine: network namespaces with addresses, on a switch of which a plug can be pulled.

The switch is a bridge in a namespace of its own. Nothing of it is seen outside, so that tests side by side may have the
same addresses, and all of it is gone with the namespaces. Linux, and root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GATEWAY = "10.77.0.254"
RESOLVERS = Path("/etc/netns")  # of each namespace, in place of /etc/resolv.conf
PREFIX = "bct"  # of the namespaces' names, before the process id of the test


@dataclass(frozen=True)
class Host:
    """Where processes run, and their address there; without a namespace: this machine, by its loopback."""

    address: str = "127.0.0.1"
    namespace: str = ""
    switch: str = ""

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs another one there, in the same process."""
        return ["ip", "netns", "exec", self.namespace, *words] if self.namespace else list(words)

    def cut(self) -> None:
        """Pull the plug: packets vanish, nobody is told, nothing dies."""
        _ip("-n", self.switch, "link", "set", "dev", self.namespace, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("-n", self.switch, "link", "set", "dev", self.namespace, "up")


@contextmanager
def network(hosts: int) -> Iterator[list[Host]]:
    """Hosts 10.77.0.1, 10.77.0.2 and so on, on a switch. What runs there is killed at the end."""
    _remove_orphans()
    names = [f"{PREFIX}{os.getpid()}-{number}" for number in range(hosts + 1)]
    switch, *ends = names
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "dev", "lo", "up")
        _ip("-n", switch, "link", "add", "name", "bridge", "type", "bridge")
        _ip("-n", switch, "addr", "add", f"{GATEWAY}/24", "dev", "bridge")
        _ip("-n", switch, "link", "set", "dev", "bridge", "up")
        # It says of all that lies beyond that it cannot be reached: nobody waits for an answer from the internet.
        _ip("netns", "exec", switch, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        found = [Host(f"10.77.0.{number}", end, switch) for number, end in enumerate(ends, 1)]
        for host in found:
            _plug_in(host)
        yield found
    finally:
        for name in names:
            _remove(name)


@cache
def no_network() -> str:
    """Why there can be none here; empty: there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    try:
        with network(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()}"


def _plug_in(host: Host) -> None:
    name = host.namespace
    _ip("-n", name, "link", "add", "name", "eth0", "type", "veth", "peer", "name", name, "netns", host.switch)
    _ip("-n", host.switch, "link", "set", "dev", name, "master", "bridge", "up")
    _ip("-n", name, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", name, "link", "set", "dev", "eth0", "up")
    # Ray finds a machine's address by the way that it would take to the internet.
    _ip("-n", name, "route", "add", "default", "via", GATEWAY)
    (RESOLVERS / name).mkdir(parents=True)
    (RESOLVERS / name / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody there: refused, at once


def _remove_orphans() -> None:
    """Namespaces of tests that were killed."""
    for line in subprocess.check_output(["ip", "netns", "list"], text=True).splitlines():
        name = line.split()[0]
        pid, _, number = name.removeprefix(PREFIX).partition("-")
        if name.startswith(PREFIX) and pid.isdigit() and number.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(name)


def _remove(namespace: str) -> None:
    """Remove a namespace, if it is there, and what still runs in it: it would keep the address alive."""
    pids = subprocess.run(["ip", "netns", "pids", namespace], check=False, capture_output=True, text=True).stdout
    for pid in map(int, pids.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
    shutil.rmtree(RESOLVERS / namespace, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
