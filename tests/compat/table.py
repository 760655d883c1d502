"""Writes the support table of the README here from the results: `python -m tests.compat.table`."""

import json
import re
from pathlib import Path
from typing import Any

from tests.compat.sets import SETS

__all__ = ["README", "RESULTS", "ROOT", "readme_with_table", "results", "support_table"]

ROOT = Path(__file__).parents[2]
README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- support: [^>]* -->\n).*?(<!-- end of support -->)", re.DOTALL)
COLUMNS = ("torch", "transformers", "accelerate", "datasets", "trl", "peft")


def results() -> list[dict[str, Any]]:
    """What the sets gave, in their order; sets that were never run are left out."""
    paths = [RESULTS / f"{each.name}.json" for each in SETS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def support_table(found: list[dict[str, Any]]) -> str:
    """A Markdown table, a set in each row."""
    lines = [
        f"| set | Python | {' | '.join(COLUMNS)} | Lightning | tests |",
        f"|---{'|---' * (len(COLUMNS) + 3)}|",
    ]
    for result in found:
        versions = result["versions"]
        cells = [result["about"], result["python"]]
        cells += [versions.get(name, "") for name in COLUMNS]
        cells += [_lightning(versions), _outcome(result["tests"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _lightning(versions: dict[str, str]) -> str:
    if "lightning" in versions or "pytorch-lightning" not in versions:
        return versions.get("lightning", "")
    return f"{versions['pytorch-lightning']} (`pytorch_lightning`)"


def _outcome(tests: dict[str, Any]) -> str:
    passed = sum(test["passed"] for test in tests.values())
    failed = sum(len(test["failed"]) for test in tests.values())
    return f"{passed} passed" + (f", **{failed} failed**" if failed else "")


def readme_with_table(text: str) -> str:
    """The README's text with the table of the results between its markers.

    Raises:
        ValueError: If the markers are not there.
    """
    table = support_table(results())
    text, count = BLOCK.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    if count != 1:
        raise ValueError("tests/compat/README.md has no block between the support markers")
    return text


if __name__ == "__main__":
    README.write_text(readme_with_table(README.read_text()))
