"""The report for bug reports: complete, JSON-ready, and with missing extras too."""

import importlib.metadata
import json

import pytest

from poprisk_integrations import __version__
from poprisk_integrations.cli.commands import env
from poprisk_integrations.cli.main import main


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"system", "packages", "extras", "devices"}
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["packages"]["poprisk_integrations"] == __version__
    assert "gloo" in report["devices"]["distributed_backends"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for section, entries in env.collect().items():
        assert section in out
        assert all(name in out for name in entries)


def test_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("trl", "lightning", "pytorch-lightning"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = env.collect()
    assert report["packages"]["trl"] == "not installed"
    assert report["extras"] == {
        "hf": "available",
        "trl": ["trl"],
        "lightning": ["lightning"],
        "demo": ["trl"],
    }


def test_either_lightning_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lightning":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.4.0" if name == "pytorch-lightning" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = env.collect()
    assert report["packages"]["lightning"] == "not installed"
    assert report["packages"]["pytorch-lightning"] == "2.4.0"
    assert report["extras"]["lightning"] == "available"
