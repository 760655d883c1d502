"""Nothing half-written, and a directory that cannot be written is refused before any work."""

import argparse
import json
import os
from pathlib import Path

import pytest

from poprisk_integrations.cli.commands import demo
from poprisk_integrations.cli.demo.output_files import (
    prepare_directory,
    write_json,
)
from poprisk_integrations.cli.errors import UsageError


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *argv])


def test_json_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_directories_are_created(tmp_path: Path) -> None:
    assert prepare_directory(tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_out_that_is_no_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("here first")
    monkeypatch.setattr(
        "poprisk_integrations.cli.demo.present.run_and_write", lambda *_, **__: pytest.fail("ran")
    )
    with pytest.raises(UsageError, match="cannot write there") as caught:
        demo.run(parse("--out", str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "here first"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_out_that_cannot_be_written() -> None:
    # Root may write anywhere but here.
    with pytest.raises(UsageError, match="--out /proc/self: cannot write there"):
        demo.run(parse("--out", "/proc/self"))


@pytest.mark.parametrize("seed", ["-1", str(2**31)])
def test_seed_out_of_range(seed: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--seed {seed}: must be from 0"):
        demo.run(parse("--out", str(tmp_path), "--seed", seed))


def test_defaults() -> None:
    args = parse()
    assert (args.out, args.seed, args.quick, args.quiet, args.json) == (
        "poprisk_demo",
        0,
        False,
        False,
        False,
    )
