"""Virtual environments: their Python, the files that are installed, what the tests say there."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Environment", "Outcome", "build", "find_python", "unpack_tests"]

ROOT = Path(__file__).parents[2]
PACKAGE = "poprisk_integrations"

# The last is what torch up to 2.7 sets itself, late: a test would seem to change it.
SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CUDA_MODULE_LOADING": "LAZY"}

# A step of the optimizer with nothing but what was asked for: before pytest and its needs.
SMOKE = """
import torch
from poprisk_integrations import PopRiskAdamW
weight = torch.nn.Parameter(torch.ones(3))
optimizer = PopRiskAdamW([weight])
for _ in range(3):
    weight.square().sum().backward()
    optimizer.step()
assert (weight < 1).all()
"""


@dataclass
class Outcome:
    """Tests of one file: how many passed, and what of the others.

    Args:
        passed: Their number.
        failed: Test and the last line of its error.
        skipped: Test and reason.
    """

    passed: int
    failed: dict[str, str]
    skipped: dict[str, str]


class Environment:
    """A virtual environment in a folder, made when `create` is called.

    Args:
        folder: Where it is or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def create(self, python: str) -> None:
        """Make it from an interpreter."""
        subprocess.run([python, "-m", "venv", str(self.folder)], check=True)

    def install(self, requirements: list[str]) -> None:
        """Let pip resolve them.

        Raises:
            RuntimeError: If it cannot.
        """
        quiet = ("--quiet", "--no-compile", "--disable-pip-version-check")
        self._run("-m", "pip", "install", *quiet, *requirements, timeout=2400)

    def smoke(self, folder: Path) -> None:
        """A few steps of the optimizer, away from the checkout."""
        self._run("-c", SMOKE, cwd=folder, timeout=300)

    def report(self, folder: Path) -> dict[str, Any]:
        """What `poprisk env` says."""
        words = ("-m", "poprisk_integrations.cli", "env", "--json")
        return dict(json.loads(self._run(*words, cwd=folder, timeout=300)))

    def test(self, root: Path, files: list[str]) -> dict[str, Outcome]:
        """Run test files of an unpacked sdist; warnings are upstream's business here."""
        xml = root / "junit.xml"
        options = ("-q", "-p", "no:cacheprovider", "-W", "default", "-o", "filterwarnings=")
        options += ("--continue-on-collection-errors",)
        command = ["-m", "pytest", *options, f"--junitxml={xml}", *files]
        self._run(*command, cwd=root, timeout=3000, check=False)
        if not xml.exists():
            raise RuntimeError("pytest wrote no result")
        return _read(xml)

    def _run(self, *words: str, cwd: Path | None = None, timeout: float, check: bool = True) -> str:
        done = subprocess.run(
            [str(self.python), *words],
            cwd=cwd,
            env={**os.environ, **SETTINGS},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(words)[:200]}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
            )
        return done.stdout


def _read(xml: Path) -> dict[str, Outcome]:
    """pytest's XML by file."""
    outcomes: dict[str, Outcome] = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        module, name = _place(case)
        outcome = outcomes.setdefault(module, Outcome(0, {}, {}))
        bad = [part for part in case if part.tag in ("failure", "error")]
        skip = case.find("skipped")
        if bad:
            outcome.failed[name] = _error(bad[0])
        elif skip is not None:
            outcome.skipped[name] = skip.get("message") or ""
        else:
            outcome.passed += 1
    return outcomes


def _place(case: ElementTree.Element) -> tuple[str, str]:
    """File and test; a file that could not be imported has a case of its own name."""
    name = case.get("name") or ""
    parts = (case.get("classname") or name).split(".")
    module = ".".join(part for part in parts if part[:1].islower())
    return module.removeprefix("tests.").removeprefix("compat.contract."), name


def _error(part: ElementTree.Element) -> str:
    """The line that says what went wrong, of a traceback."""
    lines = [line[1:].strip() for line in (part.text or "").splitlines() if line.startswith("E ")]
    return (lines or [part.get("message") or ""])[0][:200]


def find_python(version: str) -> str | None:
    """An interpreter of this version ("3.11"), or None."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [on_path] if on_path else []
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    return next((path for path in candidates if _version_of(path) == version), None)


def _version_of(python: str) -> str | None:
    """What it says of itself: a shim on PATH may start nothing."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def build(folder: Path) -> tuple[Path, Path]:
    """Sdist, and the wheel that is built from it.

    A committed copy: the sdist holds what git tracks, and the checkout stays as it is.
    """
    source = folder / "source"
    listing = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    _git(source, "init", "-q")
    _git(source, "add", "-A")
    who = ("-c", "user.name=build", "-c", "user.email=build@localhost")
    _git(source, *who, "commit", "-q", "-m", "build")
    out = folder / "dist"
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """The sdist without the package: its tests then import the installed one."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    shutil.rmtree(root / PACKAGE)
    shutil.rmtree(root / f"{PACKAGE}.egg-info")  # else the metadata is this, not the wheel's
    return root


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
