"""Step time and state size of PopRiskAdamW's paths and of rivals, paired with AdamW(fused=True).

`--part sources`: every noise source and grain. `--part llama`: share of the optimizer in a whole
training step. `--part compile_time`: the first fused step in a new process. Resumable: cells in
today's result file are not measured again.
"""

import argparse
import gc
from pathlib import Path
from statistics import median

import torch
from benchmarks.harness.figures import plt, save
from benchmarks.harness.provenance import read_csv, result_name, write_csv
from benchmarks.harness.timing import ratio_row, seconds
from benchmarks.optimizer_step.arms import (
    ARMS,
    BASE,
    SIZES,
    Arm,
    Shapes,
    fused,
    make,
    rival_arms,
    shapes,
    state_bytes,
)
from benchmarks.optimizer_step.parts import PARTS

TAKES = ("part",)
ADAMW_BYTES = 28  # p, m, v read and written, g read; float32
STATISTICS, EVERY = "ours, fused, statistics every 50", 50


def measure(name: str, arm: Arm, sizes: Shapes, rounds: int) -> dict:
    """One row: the arm against the base, step by step."""
    base, other = make(ARMS[BASE], sizes), make(arm, sizes)
    first = seconds(other.step)
    base.step()
    pairs = [(seconds(other.step), seconds(base.step)) for _ in range(rounds + 2)][2:]
    row = _row(name, other, pairs, ratio_row([a / b for a, b in pairs]))
    row |= {"bytes_ratio": round(arm.bytes / ADAMW_BYTES, 3) if arm.bytes else ""}
    row |= {"first_step_seconds": round(first, 2)}
    del base, other
    gc.collect()
    return row


def measure_statistics(sizes: Shapes, rounds: int) -> dict:
    """What `collect_stats_every=50` adds to the mean step: a sampled step beside a plain one."""
    plain, sampled = (make(Arm(fused(collect_stats_every=every)), sizes) for every in (0, 1))

    def sample() -> None:
        sampled.step()
        sampled.gate_stats()

    pairs = [(seconds(sample), seconds(plain.step)) for _ in range(rounds + 3)][3:]
    return _row(
        STATISTICS, sampled, pairs, ratio_row([1 + (a / b - 1) / EVERY for a, b in pairs], 4)
    )


def _row(name: str, optimizer: torch.optim.Optimizer, pairs: list, ratios: dict) -> dict:
    ours, base = (round(1e3 * median(times), 2) for times in zip(*pairs, strict=True))
    return {
        "arm": name,
        "path": getattr(optimizer, "path", ""),
        **ratios,
        "bytes_ratio": "",
        "state_bytes": round(state_bytes(optimizer), 2),
        "milliseconds": ours,
        "base_milliseconds": base,
        "first_step_seconds": "",
        "rounds": len(pairs),
    }


def main(args: argparse.Namespace) -> list[str]:
    """Measure what the result file lacks, write after each cell, draw."""
    if args.part:
        rows = PARTS[args.part](args.quick)
        write_csv(args.out / f"{args.part}_{result_name()}.csv", rows)
        return [str(row) for row in rows]
    arms = {n: ARMS[n] for n in (BASE, "ours, default", "ours, foreach")}
    if not args.quick:
        arms = {**ARMS, **rival_arms()}
    path = args.out / f"{result_name()}.csv"
    rows: list[dict] = list(read_csv(path)) if path.exists() else []
    done = {(r["size"], r["layout"], r["arm"]) for r in rows}

    def keep(size: str, layout: str, sizes: Shapes, row: dict) -> None:
        cell = {"size": size, "layout": layout, "tensors": len(sizes)}
        rows.append({**cell, **row, "threads": torch.get_num_threads()})
        write_csv(path, rows)
        print({k: rows[-1][k] for k in ("size", "layout", "arm", "path", "ratio")}, flush=True)

    for size in ("1M",) if args.quick else SIZES:
        for layout in ("large", "small"):
            sizes = shapes(SIZES[size] // (64 if args.quick else 1), layout)
            rounds = 3 if args.quick else 9 if size == "100M" else 25
            for name, arm in arms.items():
                if (size, layout, name) not in done and not (size == "100M" and arm.slow):
                    fewer = arm.slow or "8-bit" in name
                    keep(size, layout, sizes, measure(name, arm, sizes, 5 if fewer else rounds))
            if (size, layout) == ("20M", "large") and (size, layout, STATISTICS) not in done:
                keep(size, layout, sizes, measure_statistics(sizes, rounds))
    draw(read_csv(path), path.with_suffix(".png"))
    return []


def draw(rows: list[dict], path: Path) -> None:
    """Ratios at 20M (else the first size) in both layouts, with the byte-count limit as a line."""
    size = "20M" if any(r["size"] == "20M" for r in rows) else rows[0]["size"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained", sharey=True)
    for axis, layout in zip(axes, ("large", "small"), strict=True):
        chosen = [
            r
            for r in reversed(rows)
            if (r["size"], r["layout"]) == (size, layout) and r["arm"] != STATISTICS
        ]
        for i, row in enumerate(chosen):
            ratio, low, high = (float(row[k]) for k in ("ratio", "ratio_p10", "ratio_p90"))
            axis.barh(
                row["arm"],
                ratio,
                xerr=[[ratio - low], [high - ratio]],
                color="#c0504d" if row["arm"].startswith("ours") else "#9a9a9a",
                ecolor="#333333",
                capsize=2,
            )
            if row["bytes_ratio"]:
                limit = float(row["bytes_ratio"])
                axis.plot([limit, limit], [i - 0.42, i + 0.42], color="#1f4e79", lw=2.5)
            axis.text(ratio * 1.06, i + 0.12, f"{ratio:.2f}", fontsize=8, va="bottom")
        axis.axvline(1.0, color="black", lw=0.8, ls=":")
        axis.set_xscale("log")
        axis.set_xlim(0.3, 1.6 * max(float(r["ratio_p90"]) for r in chosen))
        axis.set_title(f"{size} parameters in {chosen[0]['tensors']} tensors")
        axis.set_xlabel("step time / AdamW fused, paired (median, 10-90 %)")
    axes[0].plot([], [], color="#1f4e79", lw=2.5, label="limit by bytes moved")
    axes[0].legend(loc="lower right", fontsize=8)
    save(figure, path, dpi=130)
