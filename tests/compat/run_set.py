"""Runs the contract on sets of versions: `python -m tests.compat.run_set [NAME...]`."""

import argparse
import dataclasses
import datetime
import json
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.compat.environment import Environment, build, find_python, unpack_tests
from tests.compat.sets import SETS, TOOLS, VersionSet
from tests.compat.table import RESULTS

__all__ = ["make_environment", "run_set", "write_result"]

CONTRACT = ("imports", "optimizer", "trainer", "lightning", "dpo")
# Tests of the repository that know what older versions lack.
FILES = {
    "torch": (
        "unit/test_private_names.py",
        "unit/optim/test_adamw.py",
        "unit/optim/test_checkpoints.py",
    ),
    "transformers": ("unit/huggingface/test_registration.py",),
    "trl": ("unit/trl/test_upstream.py",),
}
SHOWN = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "trl",
    "peft",
    "lightning",
    "pytorch-lightning",
    "rich",
)


def make_environment(chosen: VersionSet, python: str, wheel: Path, folder: Path) -> Environment:
    """Install a set; where the folder holds it already, only this wheel.

    Args:
        chosen: The versions.
        python: The interpreter.
        wheel: This package.
        folder: Of this set: the environment, and how long it took to install.
    """
    environment = Environment(folder / "venv")
    took = folder / "install_seconds.txt"
    if took.exists():
        environment.install(["--no-deps", "--force-reinstall", str(wheel)])
        environment.install(list(TOOLS))
        return environment
    start = time.monotonic()
    environment.create(python)
    environment.install(chosen.requirements(str(wheel)))
    environment.smoke(folder)
    environment.install(list(TOOLS))
    took.write_text(f"{time.monotonic() - start:.0f}")
    return environment


def run_set(chosen: VersionSet, environment: Environment, sdist: Path) -> dict[str, Any]:
    """Run the tests of a set and say what was found.

    Args:
        chosen: The versions.
        environment: Where they are installed.
        sdist: Holds the tests.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        root = unpack_tests(sdist, Path(scratch))
        report = environment.report(root)
        found = report["packages"]
        versions = {name: found[name] for name in SHOWN if found[name] != "not installed"}
        names = [f"tests/compat/contract/check_{name}.py" for name in CONTRACT]
        names += [f"tests/{name}" for key in FILES if key in versions for name in FILES[key]]
        outcomes = environment.test(root, names)
    return {
        "set": chosen.name,
        "about": chosen.about,
        "pins": list(chosen.pins),
        "date": datetime.date.today().isoformat(),
        "package": found["poprisk_integrations"],
        "python": report["system"]["python"],
        "versions": versions,
        "tests": {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()},
        "seconds": {
            "install": int((environment.folder.parent / "install_seconds.txt").read_text()),
            "tests": round(time.monotonic() - start),
        },
    }


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="sets; all by default")
    parser.add_argument("--keep", type=Path, help="use and keep environments in this folder")
    parser.add_argument("--install-only", action="store_true", help="make them, with --keep")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Run the named sets, or all, and write their results."""
    if find_spec("build") is None:
        raise SystemExit("build is not installed. Run: pip install -e '.[dev]'")
    args = _arguments(words)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        sdist, wheel = build(Path(scratch) / "build")
        for chosen in SETS:
            if args.names and chosen.name not in args.names:
                continue
            python = find_python(chosen.python)
            if python is None:
                print(f"{chosen.name}: skipped, no Python {chosen.python} here", flush=True)
                continue
            folder = (args.keep or Path(scratch)).absolute() / chosen.name
            folder.mkdir(parents=True, exist_ok=True)
            environment = make_environment(chosen, python, wheel, folder)
            if not args.install_only:
                failed |= not write_result(run_set(chosen, environment, sdist))
            if args.keep is None:
                shutil.rmtree(folder)
    return int(failed)


def write_result(result: dict[str, Any]) -> bool:
    """Write a set's result, say it in a line; True if nothing failed."""
    path = RESULTS / f"{result['set']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    tests = result["tests"].values()
    failures = [name for test in tests for name in test["failed"]]
    passed = sum(test["passed"] for test in tests)
    print(f"{result['set']}: {passed} passed, failed: {failures or 'none'}", flush=True)
    return not failures


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
