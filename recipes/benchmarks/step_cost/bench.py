"""Step time of PopRiskAdamW's paths relative to torch.optim.AdamW, paired round by round.

Usage: python recipes/benchmarks/step_cost/bench.py [--out DIR] [--quick]
"""

import argparse
import random
import sys
import time
from pathlib import Path

import matplotlib
import torch

from poprisk_integrations import PopRiskAdamW

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import result_name, write_csv

ARMS = {
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "ours, gate=none": lambda p: PopRiskAdamW(p, gate="none"),
    "ours, default": lambda p: PopRiskAdamW(p),
    "ours, single tensor": lambda p: PopRiskAdamW(p, foreach=False),
    "ours, foreach": lambda p: PopRiskAdamW(p, foreach=True),
    "ours, capturable": lambda p: PopRiskAdamW(p, capturable=True),
}
BASE = "AdamW for-loop"


def shapes(width: int) -> list[tuple[int, ...]]:
    """Parameter shapes of a small 4-layer transformer."""
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width), (width,), (width,)]
    return [(8000, width), *layer * 4]


def main() -> None:
    """Measure, write the CSV, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    args = parser.parse_args()
    width, rounds = (16, 3) if args.quick else (384, 25)
    torch.manual_seed(0)
    random.seed(0)
    optimizers = {}
    for name, make in ARMS.items():
        params = [torch.nn.Parameter(torch.randn(s) * 0.02) for s in shapes(width)]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        optimizers[name] = make(params)
    numel = sum(p.numel() for p in params)
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for round_ in range(rounds + 3):  # three rounds of warm-up
        for name in random.sample(list(ARMS), len(ARMS)):
            start = time.perf_counter()
            optimizers[name].step()
            elapsed = time.perf_counter() - start
            if round_ >= 3:
                times[name].append(elapsed)
    rows = []
    for name in ARMS:
        ratios = sorted(t / b for t, b in zip(times[name], times[BASE], strict=True))
        rows.append(
            {
                "arm": name,
                "path": getattr(optimizers[name], "path", "torch"),
                "ratio_median": round(ratios[len(ratios) // 2], 3),
                "ratio_p10": round(ratios[len(ratios) // 10], 3),
                "ratio_p90": round(ratios[-1 - len(ratios) // 10], 3),
                "rounds": rounds,
                "parameters": numel,
                "tensors": len(params),
                "threads": torch.get_num_threads(),
            }
        )
        print(rows[-1], flush=True)
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw(rows, path.with_suffix(".png"))


def draw(rows: list[dict], path: Path) -> None:
    """Median ratio per arm with its 10 %-90 % range."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    medians = [r["ratio_median"] for r in rows][::-1]
    names = [f"{r['arm']}: {r['ratio_median']:.2f}" for r in rows][::-1]
    spread = [
        [m - r["ratio_p10"] for m, r in zip(medians, rows[::-1], strict=True)],
        [r["ratio_p90"] - m for m, r in zip(medians, rows[::-1], strict=True)],
    ]
    colors = ["#c0504d" if n.startswith("ours") else "#7f7f7f" for n in names]
    axis.barh(names, medians, xerr=spread, color=colors, ecolor="#333333", capsize=2)
    axis.axvline(1.0, color="black", lw=0.8, ls=":")
    axis.set_xlabel("step time / step time of torch AdamW for-loop, same round (median, 10-90 %)")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
