"""Which Ray a job joins, and what it says of one that is gone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pipeline.cluster import connect, ray_address
from pipeline.errors import ClusterError
from pipeline.workers.interface import interface_of

GONE = "127.0.0.1:9"  # the discard port: nothing listens on it


def leave_address(folder: Path, address: str) -> None:
    """What `ray start` leaves for the processes of its machine."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)


def test_a_cluster_that_was_named_and_is_gone_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", GONE)
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at RAY_ADDRESS={GONE} .*refused.*: start it, or"):
        connect()


def test_what_a_killed_cluster_has_left_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_address() is None
    leave_address(tmp_path, GONE)
    assert ray_address() == "local"


def test_a_cluster_of_this_machine_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.create_server(("", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        leave_address(tmp_path, address)
        found = ray_address()
        assert found is not None
        assert found.endswith(address.rpartition(":")[2]), "by the address of the machine"
        monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
        assert ray_address() == "ray://elsewhere:10001"


def test_a_card_is_found_by_the_address_that_it_has() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None, "an address of no machine (RFC 5737)"
