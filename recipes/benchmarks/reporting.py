"""What every benchmark writes beside its numbers: versions, hardware, a CSV in one move."""

import csv
import datetime
import os
import platform
from pathlib import Path

import torch

import poprisk_integrations


def hardware() -> str:
    """A short name of what the numbers were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"{os.cpu_count()}-core-{platform.machine()}"


def result_name() -> str:
    """`<date>_<hardware>`, the stem of a result file."""
    return f"{datetime.date.today().isoformat()}_{hardware()}"


def provenance() -> dict[str, str]:
    """Versions and hardware, to be repeated in each row."""
    return {
        "poprisk_integrations": poprisk_integrations.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware(),
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with their provenance; a file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**row, **provenance()} for row in rows]
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
