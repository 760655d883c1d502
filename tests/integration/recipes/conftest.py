"""Recipe scripts run in this process: the frameworks are imported once for all."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no network."""

    def no_network(*args: object) -> NoReturn:
        raise AssertionError("a smoke run reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    return tmp_path
