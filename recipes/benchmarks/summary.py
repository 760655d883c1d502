"""README.md of this folder, from the studies' READMEs and result files."""

import re

from benchmarks.harness.provenance import BENCHMARKS
from benchmarks.harness.tables import comparisons, read_scores

__all__ = ["SHOWN", "findings", "gates", "page", "verdicts"]

GATE_STUDIES = ("sparse_signal", "noisy_labels", "small_lm", "pinn", "inr")
SHOWN = ("soft-32", "norm(soft-32)", "ratio(soft-32)", "paper", "soft-5", "snr-32")
INTRODUCTION = """
## Questions and verdicts

One question for each folder: its README has the set-up, the decision rule written before the run,
the verdict and what it does not show; `results/` has the CSV, with versions and hardware in each
row (in new ones the commit too), and the plot. What did not work stays.

From `recipes/`: `python -m benchmarks NAME` runs a study, `--quick --out DIR` the same in seconds,
`python -m benchmarks all --out DIR` all of them. *Frozen* studies, whose question is closed, keep
README, tables and pictures; their README names the commit and the command that made them. What the
studies share: [harness](harness).

This page is written by `python -m benchmarks --summary`; a test writes it again and compares.
"""


def page() -> str:
    """The whole README."""
    top = ["# Benchmarks", "", "## What follows for users", "", *findings()]
    return "\n".join([*top, INTRODUCTION, *verdicts(), "", *gates(), ""])


def findings() -> list[str]:
    """What each study tells users to do, a line each."""
    lines = []
    for path in sorted(BENCHMARKS.glob("*/README.md")):
        found = re.search(r"^\*For users:\* (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None:
            lines.append(f"- {found[1]} [{path.parent.name}]({path.parent.name})")
    return lines


def verdicts() -> list[str]:
    """Question and verdict of every folder, from its README."""
    lines = ["| question | verdict |", "|---|---|"]
    for path in sorted(BENCHMARKS.glob("*/README.md")):
        text = path.read_text(encoding="utf-8")
        _, found, result = text.partition("## Result")
        if not found:
            continue
        question = text.splitlines()[0].removeprefix("# ")
        verdict = re.search(r"\*\*(.+?)\*\*", result, flags=re.DOTALL)
        if verdict is None:
            raise ValueError(f"{path}: no verdict in bold after '## Result'")
        said = " ".join(verdict[1].split()).removeprefix("Verdict: ")
        is_kept = (path.parent / "study.py").exists() or "*Frozen*" not in text
        frozen = "" if is_kept else " (frozen)"
        lines.append(f"| [{question}]({path.parent.name}){frozen} | {said} |")
    return lines


def gates(draws: int = 10_000) -> list[str]:
    """Gates and controls against tuned AdamW, from the committed scores."""
    rows = comparisons(read_scores(GATE_STUDIES, "scores", BENCHMARKS), draws)
    at = {(row["study"], row["arm"]): row for row in rows}
    studies = [s for s in GATE_STUDIES if any(study == s for study, _ in at)]
    whole = next((s for s, arm in at if s.startswith("all") and arm == "soft-32"), "")
    lines = [
        "## Gates against AdamW",
        "",
        "Relative to AdamW with the same seeds, in %, positive where the arm is better, with a 95 %"
        " interval over seeds. *Tuned*: each with the learning rate best on the other seeds, "
        "at the end of training. *Range*: mean over the learning rates 3e-4, 1e-3, 3e-3, 1e-2. "
        "`soft-32` is the default gate with the paper's third tensor (the default reads its noise "
        "off the moments), `norm(soft-32)` AdamW with steps of its length, "
        "`ratio(soft-32)` a threshold on m^2/v, which needs no third state, `soft-5` the stricter "
        "gate of DPO ([what the arms and scores are](harness)). How the default was chosen: "
        "[default_gate](default_gate).",
    ]
    for score in ("tuned", "range"):
        lines += ["", "| " + " | ".join([score, *(f"`{arm}`" for arm in SHOWN)]) + " |"]
        lines.append("|---" * (len(SHOWN) + 1) + "|")
        for study in [*studies, whole]:
            name = f"[{study}]({study})" if study in studies else f"{study} studies"
            cells = [_cell(at.get((study, arm)), score) for arm in SHOWN]
            lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _cell(row: dict[str, str] | None, score: str) -> str:
    if row is None:
        return ""
    mean, low, high = (100 * float(row[score + end]) for end in ("", "_low", "_high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
