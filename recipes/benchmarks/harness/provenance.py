"""What every result row says beside its numbers: versions, hardware, commit; CSV in one move."""

import csv
import datetime
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

import poprisk_integrations

__all__ = ["BENCHMARKS", "PROVENANCE", "hardware", "read_csv", "result_name", "write_csv"]

BENCHMARKS = Path(__file__).parents[1]
PROVENANCE = ("poprisk_integrations", "torch", "python", "hardware", "commit", "dirty")


def hardware() -> str:
    """A short name of what the numbers were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"{os.cpu_count()}-core-{platform.machine()}"


def result_name() -> str:
    """`<date>_<hardware>`, the stem of a result file."""
    return f"{datetime.date.today().isoformat()}_{hardware()}"


@cache
def _code() -> dict[str, str]:
    """The commit that is checked out, and whether tracked files differ from it ("" without git)."""

    def git(*words: str) -> str:
        line = ["git", "-C", str(BENCHMARKS), *words]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": str(int(bool(changed)))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "", "dirty": ""}


def _provenance() -> dict[str, str]:
    return {
        "poprisk_integrations": poprisk_integrations.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware(),
        **_code(),
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with their provenance, the file whole or not at all.

    A row that was read back keeps the provenance it had: it was not measured now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    now = _provenance()
    rows = [
        {**row, **{k: row.get(k, "") for k in now}} if PROVENANCE[0] in row else {**row, **now}
        for row in rows
    ]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a result file, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
