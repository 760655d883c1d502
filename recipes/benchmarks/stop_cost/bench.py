"""What a gradient window adds to a training step.

Usage: python recipes/benchmarks/stop_cost/bench.py [--out DIR] [--quick]
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import hardware, read_csv, write_csv

from poprisk_integrations.diagnostics import GradientWindow

TARGETS = {"exact": 0.02, "sample": 0.01}
ARMS = [None, *((a, risk) for a in TARGETS for risk in (False, True))]  # None: no window
BLOCKS = 4  # of a window, each with its part of the close


def cnn(quick: bool) -> tuple[nn.Module, Callable]:
    """225,000 parameters, a batch of 32 images of 28 x 28."""
    width = 8 if quick else 32
    model = nn.Sequential(
        *(nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    x, y = torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def llama(quick: bool) -> tuple[nn.Module, Callable]:
    """4.2 million parameters in 39 tensors, a batch of 8 x 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, tokens = (64, 1, 16) if quick else (256, 4, 128)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model, x = LlamaForCausalLM(config), torch.randint(0, 2048, (8, tokens))
    return model, lambda: model(input_ids=x, labels=x).loss


def interval(blocks: list, statistic: Callable) -> tuple[float, float]:
    """95 % interval of a statistic of resampled blocks."""
    draw = random.Random(0)
    found = sorted(statistic(draw.choices(blocks, k=len(blocks))) for _ in range(1000))
    return found[25], found[-26]


def measure(name: str, make: Callable, steps: int, rounds: int, quick: bool) -> list[dict]:
    """Windows of all arms, step by step in turn, on one model."""
    torch.manual_seed(0)
    model, loss = make(quick)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    windows = {
        arm: GradientWindow(steps, accumulator=arm[0], measure_risk=arm[1]) for arm in ARMS if arm
    }
    times: dict = {arm: [] for arm in ARMS}  # per step: CPU seconds in the window, and of the rest
    for round_ in range(rounds + 1):  # the first one warms up: buffers, allocator, CPU
        for _ in range(steps if round_ else min(steps, 10)):
            for arm in ARMS:
                start = time.process_time()
                loss().backward()
                before = time.process_time()
                if arm:
                    windows[arm].add(params)
                after = time.process_time()
                optimizer.step()
                optimizer.zero_grad()
                end = time.process_time()
                times[arm].append([after - before, end - start - (after - before)])
        for arm, window in windows.items():
            start = time.process_time()
            closed = window.close()
            per_step = (time.process_time() - start) / steps
            if round_:
                assert closed is not None
                assert closed.steps == steps
            for step in times[arm][-steps:]:
                step[0] += per_step
        if not round_:
            times = {arm: [] for arm in ARMS}
    rows = []
    size = max(1, steps // BLOCKS)

    def blocks_of(arm):
        return [times[arm][i : i + size] for i in range(0, len(times[arm]), size)]

    def share(blocks):
        return statistics.median(sum(a for a, _ in b) / sum(r for _, r in b) for b in blocks)

    def ratio(pairs):
        ours, plain = ([sum(step) for pair in pairs for step in pair[k]] for k in (0, 1))
        return statistics.median(ours) / statistics.median(plain)

    plain = blocks_of(None)
    for arm in windows:
        blocks = blocks_of(arm)
        pairs = list(zip(blocks, plain, strict=True))
        low, high = interval(blocks, share)
        ratio_low, ratio_high = interval(pairs, ratio)
        row = {
            "model": name,
            "parameters": sum(p.numel() for p in params),
            "tensors": len(params),
            "accumulator": arm[0],
            "risk": int(arm[1]),
            "share": round(share(blocks), 5),
            "share_low": round(low, 5),
            "share_high": round(high, 5),
            "target": TARGETS[arm[0]],
            "step_ratio": round(ratio(pairs), 4),
            "step_ratio_low": round(ratio_low, 4),
            "step_ratio_high": round(ratio_high, 4),
            "window_microseconds": round(1e6 * statistics.mean(a for a, _ in times[arm]), 1),
            "step_milliseconds": round(1e3 * statistics.median(sum(s) for s in times[None]), 2),
            "window": steps,
            "windows": rounds,
            "threads": torch.get_num_threads(),
        }
        rows.append(row)
        chosen = ("model", "accumulator", "risk", "share", "share_low", "share_high", "step_ratio")
        print({key: row[key] for key in chosen}, flush=True)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """The share of each arm with its interval, and the target."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, model in zip(axes, ("CNN", "Llama"), strict=True):
        chosen = [r for r in rows if r["model"] == model]
        for i, row in enumerate(chosen):
            share, low, high, target = (
                100 * float(row[key]) for key in ("share", "share_low", "share_high", "target")
            )
            axis.bar(i, share, 0.6, color="#c0504d" if int(row["risk"]) else "#e3a9a7")
            axis.errorbar(i, share, [[share - low], [high - share]], color="#333333", capsize=3)
            axis.plot([i - 0.45, i + 0.45], [target] * 2, color="#1f4e79", lw=2.5)
            axis.text(i + 0.04, high, f" {share:.2f}", fontsize=9, va="bottom", ha="left")
        names = [f"{r['accumulator']}\n{'all' if int(r['risk']) else 'F only'}" for r in chosen]
        axis.set_xticks(range(len(names)), names)
        milliseconds = float(chosen[0]["step_milliseconds"])
        axis.set_title(f"{model}, step of {milliseconds:.0f} ms", fontsize=10)
    axes[0].set_ylabel("% of a training step")
    axes[0].plot([], [], color="#1f4e79", lw=2.5, label="target")
    axes[0].set_ylim(0, 1.15 * axes[0].get_ylim()[1])
    axes[0].legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, write the CSV, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="tiny models, for tests")
    args = parser.parse_args()
    steps = 8 if args.quick else 100
    rows = []
    for name, make, rounds in (("CNN", cnn, 10), ("Llama", llama, 1)):
        rows += measure(name, make, steps, 1 if args.quick else rounds, args.quick)
    path = args.out / f"{hardware()}.csv"
    write_csv(path, rows)
    draw(read_csv(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
