"""Time and disk on a new machine, for the README here: `python -m tests.compat.clean_machine`.

A home without a file, no caches but pip's (how fast a line downloads is not the question), no
variables but PATH and what pip needs; the wheel in an environment outside of the checkout, then
both commands of the README in a fresh clone, which has what git tracks.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.compat.environment import ROOT, build
from tests.compat.table import README

__all__ = ["Machine", "Step", "main"]

BLOCK = re.compile(
    r"(<!-- clean machine: [^>]* -->\n).*?(<!-- end of clean machine -->)", re.DOTALL
)
KEPT = re.compile(r"PATH|LANG|PIP_\w+|SSL_\w+|\w+_proxy", re.IGNORECASE)
PAGE = ROOT / "README.md"
SHOWN = ("poprisk_integrations", "torch", "transformers", "trl", "lightning")


@dataclass
class Step:
    """What one command took.

    Args:
        seconds: From its start to its end.
        cpu: Of all processors, its children's too.
        first: From its start to the first line that it printed; None if it printed nothing.
        output: All that it printed.
    """

    seconds: float
    cpu: float
    first: float | None
    output: str


class Machine:
    """A folder that holds a home and all that is installed.

    Args:
        folder: One without a home.
    """

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        words = [sys.executable, "-m", "pip", "cache", "dir"]
        cache = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        self._env = {k: v for k, v in os.environ.items() if KEPT.fullmatch(k)}
        self._env |= {"HOME": str(self.home), "PIP_CACHE_DIR": cache}

    def run(self, command: str, cwd: Path) -> Step:
        """Run a line of bash; RuntimeError with the end of what it said if it fails."""
        start, before, first = time.monotonic(), _cpu(), None
        lines: list[str] = []
        with subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=cwd,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                first = time.monotonic() - start if first is None else first
                lines.append(line)
        if process.returncode:
            raise RuntimeError(f"{command}\n{''.join(lines[-40:])}")
        return Step(time.monotonic() - start, _cpu() - before, first, "".join(lines))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(words: list[str]) -> int:
    """Do what a new user does, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-tests", action="store_true", help="not the README's second command")
    args = parser.parse_args(words)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _, wheel = build(folder / "build")
        machine = Machine(folder)
        rows, versions = _wheel(machine, wheel, folder)
        rows += _clone(machine, folder, with_tests=not args.no_tests)
        rows.append(("caches in the home after all this", None, _megabytes(machine.home)))
    _write(rows, versions, busy)
    return 0


Row = tuple[str, Step | None, float | None]


def _wheel(machine: Machine, wheel: Path, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """From the built wheel: install, `poprisk env`, `poprisk demo --quick`."""
    venv, work = folder / "venv", folder / "work"
    work.mkdir()
    command = f"python3 -m venv {venv} && {venv}/bin/pip install -q -c"
    installed = machine.run(f"{command} {ROOT}/.ci/constraints.txt '{wheel}[all]'", work)
    size = _megabytes(venv)
    env = machine.run(f"{venv}/bin/poprisk env --json", work)
    report = json.loads(env.output)
    demo = machine.run(f"{venv}/bin/poprisk demo --quick", work)
    rows: list[Row] = [
        ("`pip install WHEEL[all]` in a new environment", installed, size),
        ("`poprisk env`", env, None),
        ("`poprisk demo --quick`", demo, _megabytes(work)),
    ]
    versions = {name: report["packages"][name] for name in SHOWN}
    return rows, {"Python": report["system"]["python"], **versions}


def _clone(machine: Machine, folder: Path, *, with_tests: bool) -> list[Row]:
    """Both commands of the README as they stand there; the first with the clone before it."""
    rows: list[Row] = []
    for marker in ("demo", "tests") if with_tests else ("demo",):
        (command,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*)\n```", PAGE.read_text())
        clone = f"git clone -q {ROOT} clone && " if marker == "demo" else ""
        step = machine.run(f"{clone}cd clone && {command}", folder)
        said = f"{'`git clone` and ' if clone else ''}the README's {marker} command"
        if marker == "tests":
            said += f": {step.output.strip().splitlines()[-1].strip('= ')}"
        rows.append((said, step, _megabytes(folder / "clone")))
    return rows


def _megabytes(folder: Path) -> float:
    """Disk in use, links not followed."""
    found = (path.lstat() for path in folder.rglob("*"))
    return sum(stat.st_blocks * 512 for stat in found) / 1e6


def _shown(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _write(rows: list[Row], versions: dict[str, str], busy: float) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    where = f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GB, {platform.system()}"
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    table = [
        f"{datetime.date.today()}, {where}, load {busy:.1f} before; {named}.",
        "",
        "| step | seconds | CPU seconds | first line after | MB on disk |",
        "|---|---|---|---|---|",
    ]
    for said, step, size in rows:
        taken = (None, None, None) if step is None else (step.seconds, step.cpu, step.first)
        cells = [*map(_shown, (*taken, size))]
        table.append(f"| {' | '.join([said, *cells])} |")
    text, count = BLOCK.subn(
        lambda match: "\n".join([match[1].strip(), *table, match[2]]), README.read_text()
    )
    if count != 1:
        raise ValueError("tests/compat/README.md has no block between the clean machine markers")
    README.write_text(text)
    print("\n".join(table))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
