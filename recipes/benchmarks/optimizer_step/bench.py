"""Step time and state size of PopRiskAdamW's paths and of rivals, paired with AdamW(fused=True).

Usage: python recipes/benchmarks/optimizer_step/bench.py [--out DIR] [--quick]
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from arms import ADAMW_BYTES, BASE, Arm, our_arms, rival_arms, torch_arms
from reporting import read_csv, result_name, write_csv

SIZES = {"1M": 1 << 20, "20M": 20 << 20, "100M": 100 << 20}
# What is too slow to be repeated at 100M parameters.
SLOW = ("ours, single tensor", "ours, foreach", "AdamW foreach", "AdamW for-loop")


def shapes(numel: int, layout: str) -> list[tuple[int, ...]]:
    """Shapes that add up to about `numel` elements."""
    if layout == "small":
        return [(128, 128)] * max(1, numel >> 14)
    tensors = 49 if numel >= 1 << 22 else 7
    rows = max(2, numel // 512 // tensors)
    return [(rows + (i % 3) - 1, 512) for i in range(tensors)]


def make(arm: Arm, sizes: list[tuple[int, ...]]) -> torch.optim.Optimizer:
    """The arm's optimizer with parameters and gradients; the same for the same shapes."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in sizes:
        p = torch.randn(shape, generator=generator) * 0.02
        param = torch.nn.Parameter(p.to(arm.dtype))
        param.grad = (torch.randn(shape, generator=generator) * 1e-3).to(arm.dtype)
        params.append(param)
    return arm.make(params)


def timed(step) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def tensors_in(value) -> list[torch.Tensor]:
    """Plain tensors inside a state entry (subclasses hold several)."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not torch.Tensor:
            names, _ = value.__tensor_flatten__()
            return [t for name in names for t in tensors_in(getattr(value, name))]
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    return []


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of tensors in the state, per parameter."""
    found = [t for state in optimizer.state.values() for t in tensors_in(state) if t.dim()]
    numel = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    return sum(t.numel() * t.element_size() for t in found) / numel


def measure(name: str, arm: Arm, sizes: list[tuple[int, ...]], rounds: int) -> dict:
    """One row: the arm against the base, step by step."""
    base, other = make(torch_arms()[BASE], sizes), make(arm, sizes)
    first = timed(other.step)
    base.step()
    for _ in range(2):
        base.step()
        other.step()
    pairs = [(timed(other.step), timed(base.step)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    row = {
        "arm": name,
        "path": getattr(other, "path", ""),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_p10": round(ratios[len(ratios) // 10], 3),
        "ratio_p90": round(ratios[-1 - len(ratios) // 10], 3),
        "bytes_ratio": round(arm.bytes / ADAMW_BYTES, 3) if arm.bytes else "",
        "state_bytes": round(state_bytes(other), 2),
        "milliseconds": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "base_milliseconds": round(1e3 * statistics.median(b for _, b in pairs), 2),
        "first_step_seconds": round(first, 2),
        "rounds": rounds,
    }
    del base, other
    gc.collect()
    return row


def measure_statistics(sizes: list[tuple[int, ...]], rounds: int) -> dict:
    """What `collect_stats_every=50` adds to the mean step: a sampled step beside a plain one."""
    from poprisk_integrations import PopRiskAdamW

    plain = make(Arm(lambda p: PopRiskAdamW(p, fused=True)), sizes)
    sampled = make(Arm(lambda p: PopRiskAdamW(p, fused=True, collect_stats_every=1)), sizes)
    for _ in range(3):
        plain.step()
        sampled.step()
    pairs = [
        (timed(lambda: (sampled.step(), sampled.gate_stats())), timed(plain.step))
        for _ in range(rounds)
    ]
    added = sorted((a / b - 1) / 50 for a, b in pairs)
    middle = statistics.median(added)
    print(f"statistics every 50 steps add {middle:.2%} of the step time", flush=True)
    return {
        "arm": "ours, fused, statistics every 50",
        "path": sampled.path,
        "ratio": round(1 + middle, 4),
        "ratio_p10": round(1 + added[len(added) // 10], 4),
        "ratio_p90": round(1 + added[-1 - len(added) // 10], 4),
        "bytes_ratio": "",
        "state_bytes": round(state_bytes(sampled), 2),
        "milliseconds": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "base_milliseconds": round(1e3 * statistics.median(b for _, b in pairs), 2),
        "first_step_seconds": "",
        "rounds": rounds,
    }


def main() -> None:
    """Measure what the result file lacks, write after each cell, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="tiny tensors, for tests")
    args = parser.parse_args()
    rivals, missing = ({}, {}) if args.quick else rival_arms()
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})", flush=True)
    arms = {**torch_arms(), **our_arms(), **rivals}
    if args.quick:
        arms = {n: arms[n] for n in (BASE, "ours, default", "ours, foreach")}
    cells = [(s, layout) for s in SIZES for layout in ("large", "small")]
    cells = [("1M", "large"), ("1M", "small")] if args.quick else cells
    path = args.out / f"{result_name()}.csv"
    rows = [dict(r) for r in read_csv(path)] if path.exists() else []
    done = {(r["size"], r["layout"], r["arm"]) for r in rows}

    def keep(row: dict, size: str, layout: str, sizes: list) -> None:
        cell = {"size": size, "layout": layout, "tensors": len(sizes)}
        rows.append({**cell, **row, "threads": torch.get_num_threads()})
        write_csv(path, rows)
        print({k: rows[-1][k] for k in ("size", "layout", "arm", "path", "ratio")}, flush=True)

    for size, layout in cells:
        sizes = shapes(SIZES[size] // (64 if args.quick else 1), layout)
        rounds = 3 if args.quick else 9 if size == "100M" else 25
        for name, arm in arms.items():
            too_slow = size == "100M" and (name in SLOW or name in rivals)
            if (size, layout, name) not in done and not too_slow:
                slow = name in SLOW or name in rivals or "8-bit" in name
                keep(measure(name, arm, sizes, 5 if slow else rounds), size, layout, sizes)
        name = "ours, fused, statistics every 50"
        if size == "20M" and layout == "large" and (size, layout, name) not in done:
            keep(measure_statistics(sizes, rounds), size, layout, sizes)
    draw(read_csv(path), path.with_suffix(".png"))


def draw(rows: list[dict], path: Path) -> None:
    """Ratios at 20M (else the first size) in both layouts, with the byte-count limit as a line."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = "20M" if any(r["size"] == "20M" for r in rows) else rows[0]["size"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained", sharey=True)
    for axis, layout in zip(axes, ("large", "small"), strict=True):
        chosen = [r for r in rows if (r["size"], r["layout"]) == (size, layout)]
        chosen = [r for r in chosen if "statistics" not in r["arm"]][::-1]
        ratios = [float(r["ratio"]) for r in chosen]
        spread = [
            [x - float(r["ratio_p10"]) for x, r in zip(ratios, chosen, strict=True)],
            [float(r["ratio_p90"]) - x for x, r in zip(ratios, chosen, strict=True)],
        ]
        colors = ["#c0504d" if r["arm"].startswith("ours") else "#9a9a9a" for r in chosen]
        names = [r["arm"] for r in chosen]
        axis.barh(names, ratios, xerr=spread, color=colors, ecolor="#333333", capsize=2)
        for i, (r, ratio) in enumerate(zip(chosen, ratios, strict=True)):
            if r["bytes_ratio"]:
                limit = float(r["bytes_ratio"])
                axis.plot([limit, limit], [i - 0.42, i + 0.42], color="#1f4e79", lw=2.5)
            axis.text(ratio * 1.06, i + 0.12, f"{ratio:.2f}", fontsize=8, va="bottom")
        axis.axvline(1.0, color="black", lw=0.8, ls=":")
        axis.set_xscale("log")
        axis.set_xlim(0.3, 1.6 * max(float(r["ratio_p90"]) for r in chosen))
        axis.set_title(f"{size} parameters in {chosen[0]['tensors']} tensors")
        axis.set_xlabel("step time / AdamW fused, paired (median, 10-90 %)")
    axes[0].plot([], [], color="#1f4e79", lw=2.5, label="limit by bytes moved")
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
