"""The course that studies of the gate share: families of data, rates, scores, one summary."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.harness.arms import GATES
from benchmarks.harness.figures import draw_differences
from benchmarks.harness.grid import run_arms
from benchmarks.harness.provenance import hardware, result_name, write_csv
from benchmarks.harness.tables import (
    Paired,
    against,
    member_rows,
    score_rows,
    summary_rows,
)
from benchmarks.harness.train import Member, Task, Trace, members_of

__all__ = [
    "DRAWN",
    "GATE_OPTIONS",
    "Family",
    "GateStudy",
    "Traces",
    "against_controls",
    "judged",
    "said",
]

Traces = dict[str, dict[str, Trace]]  # by family and arm
GATE_OPTIONS = ("selection", "arms", "seeds", "traces")
JUDGED = ("soft-32", "soft-5", "paper", "snr-32")
DRAWN = (
    *("AdamW", "soft-32", "norm(soft-32)", "ratio(soft-32)"),
    *("paper", "soft-5", "ratio(soft-5)", "snr-32"),
)
ARMS = (
    *("AdamW", "soft-32", "norm(soft-32)", "ratio(soft-32)", "paper", "soft-5"),
    *("norm(soft-5)", "ratio(soft-5)", "mask(soft-5)", "snr-32", "snr-fresh"),
    *("soft-5-norm", "snr-fresh-norm"),
)
SELECTION_ARMS = (*GATES, "ratio(soft-5)", "norm(soft-5)")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Conditions that are trained alike."""

    conditions: Sequence[str]  # of the data
    lrs: Sequence[float]  # learning rates
    decays: Sequence[float] = (0.0,)  # weight decays
    group: int  # members that train side by side, so that their tensors stay in cache


@dataclass(frozen=True, kw_only=True)
class GateStudy:
    """Arms over families of conditions, compared with AdamW and with the gates' controls."""

    folder: Path  # of the study
    families: dict[str, Family]  # by name
    quick: dict[str, Family]  # the same for tests
    # The task of some members of one family; its own number of steps for None.
    build: Callable[[list[Member], int | None], Task]
    metrics: dict[str, bool]  # by name, whether more is better
    scored: tuple[str, ...]  # of these, the main one first
    groups: dict[str, Callable[[str], bool]]  # of conditions, by name
    shown: tuple[str, str]  # the two groups of the picture
    better: str  # its axis
    verdict: Callable[[list[dict]], list[str]]  # the decision rule of the README, from the summary
    # Lines of the summary after the groups, from differences to AdamW to other ones.
    more: dict[str, Callable[[Paired], Paired]] | None = None
    tables: Callable[[Traces], dict[str, list[dict]]] | None = None  # further tables by name
    # Draws further pictures of the report, of the arms in `DRAWN`.
    pictures: Callable[[Traces, list[dict], Path], None]

    def summary(self, scores: Sequence[dict]) -> list[dict]:
        """What is committed of the scores; the metric is named where there are several."""
        rows = summary_rows(scores, self.groups, self.more)
        if len(self.scored) > 1:
            return rows
        return [{key: v for key, v in row.items() if key != "metric"} for row in rows]

    def main(self, args: argparse.Namespace) -> list[str]:
        """Train what is missing, write tables and pictures; the verdict."""
        torch.set_num_threads(1)
        if args.quick:
            arms = ["AdamW", "soft-5", "norm(soft-5)"]
            found = self.run(arms, args.seeds or [0, 1], args.out / "traces", self.quick, 20)
        else:
            usual = SELECTION_ARMS if args.selection else ARMS
            seeds = args.seeds or list(range(100, 105) if args.selection else range(5))
            folder = (args.traces or self.folder / "traces") / (
                "selection" if args.selection else "report"
            )
            found = self.run([*dict.fromkeys((*usual, *args.arms))], seeds, folder, self.families)
        rows = [
            row
            for traces in found.values()
            for arm, trace in traces.items()
            for row in member_rows(arm, trace, tuple(self.metrics))
        ]
        scores = self.scores(found)
        summary = self.summary(scores)
        stem = f"selection_{hardware()}" if args.selection else result_name()
        write_csv(args.out / f"{stem}.csv", rows)
        draw_differences(summary, self.shown, args.out / f"{stem}.png", self.better)
        if not args.quick:
            tables = {
                "scores": scores,
                "summary": summary,
                **(self.tables(found) if self.tables else {}),
            }
            prefix = "selection_" if args.selection else ""
            for name, table in tables.items():
                write_csv(args.out / f"{prefix}{name}_{hardware()}.csv", table)
            if not args.selection:
                drawn = [row for row in rows if row["arm"] in DRAWN]
                self.pictures(found, drawn, args.out)
        return self.verdict(summary)

    def run(
        self,
        arms: Sequence[str],
        seeds: Sequence[int],
        folder: Path,
        families: dict[str, Family],
        steps: int | None = None,
    ) -> Traces:
        """Traces by family and arm."""
        found = {}
        for name, family in families.items():
            members = members_of(seeds, family.conditions, family.lrs, family.decays)
            found[name] = run_arms(
                lambda some: self.build(some, steps),
                arms,
                members,
                folder / name,
                group=family.group,
            )
        return found

    def scores(self, found: Traces) -> list[dict]:
        """Score rows of all families, arms and scored metrics."""
        return [
            {"metric": metric, "higher": int(self.metrics[metric]), **row}
            for metric in self.scored
            for traces in found.values()
            for arm, trace in traces.items()
            for row in score_rows(arm, trace, metric, higher=self.metrics[metric])
        ]


def judged(summary: list[dict]) -> list[str]:
    """The gates that get a verdict, of those that were run."""
    return [arm for arm in JUDGED if any(row["arm"] == arm for row in summary)]


def against_controls(summary: list[dict], arm: str, group: str) -> list[dict]:
    """The lines of a gate against its controls of step length and of two moments."""
    bases = {row["base"] for row in summary if row["arm"] == arm}
    return [
        against(summary, arm, control, column, group)
        for control in (f"norm({arm})", f"ratio({arm})")
        if control in bases
        for column in ("tuned", "range")
    ]


def said(row: dict) -> str:
    """A line of a summary in words."""
    mean, low, high = (float(row[name]) for name in ("mean", "low", "high"))
    return (
        f"{row['arm']} against {row['base']}, {row['conditions']}, {row['score']}: "
        f"{mean:+.2%} [{low:+.2%}, {high:+.2%}]: {row['word']}"
    )
