"""Where the gate was reported to fail, and what helps there; see README.md for the rules.

Usage: python recipes/benchmarks/where_it_hurts/bench.py [--quick] [--out DIR] [--traces DIR]
           [--seeds S ...] [--toys NAME ...] [--arms GATE ...]
Resumable: a trace that exists is read back.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from closed_reasons import closed_rows
from experts_task import EXPERTS
from finetune_task import FINETUNE
from gate_harness.grid import Trace, run_arms
from gate_harness.scores import member_rows
from gate_harness.tasks import members_of
from halting_task import HALTING
from hurt_figures import draw_hurt, draw_jumps
from hurt_scores import toy_scores
from hurt_verdict import summarise, verdict
from remedies import ExemptAdam, arm_named
from reporting import hardware, result_name, write_csv
from toy import METRICS, Toy
from words_task import WORDS

HERE = Path(__file__).parent
TOYS = (HALTING, EXPERTS, WORDS, FINETUNE)
BARE = ("AdamW", "paper", "snr-fresh", "soft-5", "soft-32", "hard-5", "snr-32")
FULL = (
    *BARE,
    *(f"no_gate({gate})" for gate in BARE[1:]),
    *(f"{kind}({gate})" for kind in ("blend", "warmup", "norm") for gate in BARE[1:4]),
    "norm(snr-32)",
    "only(paper)",
    "only(soft-5)",
    "ratio(soft-5)",
)
QUICK = ("AdamW", "soft-5", "no_gate(soft-5)", "norm(soft-5)")
MORE = ("no_gate", "only", "blend", "warmup", "norm", "ratio")  # of a gate that --arms names
JUMPS = (
    "AdamW",
    "paper",
    "snr-fresh",
    "soft-5",
    "soft-32",
    "snr-32",
    "no_gate(soft-32)",
    "no_gate(paper)",
)


def main() -> None:
    """Train what is missing, write tables and pictures, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--quick", action="store_true", help="few steps, for tests")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of each toy's own")
    parser.add_argument("--toys", nargs="+", help="these only; else all")
    parser.add_argument("--arms", nargs="+", default=[], help="further gates, with all remedies")
    args = parser.parse_args()
    torch.set_num_threads(1)
    toys = [_small(toy) for toy in TOYS] if args.quick else list(TOYS)
    if args.seeds:
        toys = [replace(toy, seeds=tuple(args.seeds)) for toy in toys]
    names = QUICK if args.quick else FULL
    names += tuple(a for gate in args.arms for a in (gate, *(f"{kind}({gate})" for kind in MORE)))
    names = tuple(dict.fromkeys(names))
    folder = args.out / "traces" if args.quick else args.traces
    toys = [toy for toy in toys if not args.toys or toy.name in args.toys]
    traces = {toy.name: _train(toy, names, folder) for toy in toys}
    rows: list[dict] = []
    scores: list[dict] = []
    for toy in toys:
        for arm, trace in traces[toy.name].items():
            rows += [{"task": toy.name, **row} for row in member_rows(arm, trace, METRICS)]
        scores += toy_scores(toy, traces[toy.name])
    summary = summarise(scores)
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw_hurt(toys, traces, summary, path.with_suffix(".png"))
    if not args.quick:
        _write_more(toys, traces, scores, summary, args.out)
    for line in verdict(summary):
        print(line)


def _small(toy: Toy) -> Toy:
    return replace(toy, steps=24, lrs=toy.lrs[1:4], seeds=(0, 1), group=6)


def _train(toy: Toy, names: tuple[str, ...], folder: Path) -> dict[str, Trace]:
    return run_arms(
        lambda members: toy.build(members, toy.steps),
        [arm_named(name, toy.tensors, toy.affected) for name in names],
        members_of(toy.seeds, [""], toy.lrs),
        folder / toy.name,
        group=toy.group,
        optimizer_class=ExemptAdam,
    )


def _write_more(
    toys: list[Toy], traces: dict[str, dict[str, Trace]], scores: list, summary: list, out: Path
) -> None:
    write_csv(out / f"scores_{hardware()}.csv", scores)
    write_csv(out / f"summary_{hardware()}.csv", summary)
    usual = {
        toy.name: float(next(r["in_place_lr"] for r in scores if r["task"] == toy.name))
        for toy in toys
    }
    closed = [r for t in toys for r in closed_rows(t, usual[t.name], t.steps, t.steps // 20)]
    write_csv(out / f"closed_{hardware()}.csv", closed)
    routers = [toy for toy in toys if toy.jump is not None]
    arms = [arm for arm in JUMPS if arm in traces[routers[0].name]]
    draw_jumps(routers, traces, usual, arms, out / f"jumps_{hardware()}.png")


if __name__ == "__main__":
    main()
