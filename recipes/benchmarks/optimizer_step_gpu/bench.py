"""Step time of PopRiskAdamW(fused=True) relative to AdamW(fused=True), paired round by round.

Usage: python recipes/benchmarks/optimizer_step_gpu/bench.py [--out DIR] [--quick]
"""

import argparse
import importlib.metadata
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from poprisk_integrations import PopRiskAdamW

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import result_name, write_csv

FP32, BF16 = torch.float32, torch.bfloat16
STATS_EVERY = 50


@dataclass
class Arm:
    """One optimizer of a case.

    Attributes:
        name: In the table.
        step: Takes one step.
        path: What ran, as the optimizer names it.
        bytes_per_parameter: What a step must move, the read for the check of finite gradients
            included; 0 where bytes are not the question.
        target: Largest median ratio to the first arm that is good enough; None for no target.
        steps: Steps per measurement.
    """

    name: str
    step: Callable[[], object]
    path: str
    bytes_per_parameter: int
    target: float | None = None
    steps: int = 1


@dataclass
class Case:
    """Arms that are compared with the first of them.

    Attributes:
        name: In the table.
        shapes: Of the parameters.
        build: From parameters with gradients to arms.
        bytes_needed: Device memory per parameter, all arms together.
    """

    name: str
    shapes: list[tuple[int, ...]]
    build: Callable[[list[torch.nn.Parameter]], list[Arm]]
    bytes_needed: int


def transformer(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameter shapes of a decoder."""
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width), (width,), (width,)]
    return [(vocabulary, width), *layer * layers]


def ours(params: list[torch.nn.Parameter], **options) -> PopRiskAdamW:
    """Our fused optimizer; the learning rate is small, since all arms share the parameters."""
    return PopRiskAdamW(params, lr=1e-6, fused=True, **options)


def large(params: list[torch.nn.Parameter]) -> list[Arm]:
    """Float32 parameters."""
    base = torch.optim.AdamW(params, lr=1e-6, fused=True)
    plain, ungated = ours(params), ours(params, gate="none")
    low = ours(params, state_dtype={"exp_dev_sq": "bfloat16"})
    return [
        Arm("AdamW fused", base.step, "torch", 28),
        Arm("ours, gate=none", ungated.step, ungated.path, 32),
        Arm("ours, float32 states", plain.step, plain.path, 40, 1.35),
        Arm("ours, bfloat16 noise", low.step, low.path, 36, 1.20),
    ]


def small(params: list[torch.nn.Parameter]) -> list[Arm]:
    """Many small tensors: launches and the host count, not bytes."""
    base = torch.optim.AdamW(params, lr=1e-6, fused=True)
    plain, ungated = ours(params), ours(params, gate="none")
    return [
        Arm("AdamW fused", base.step, "torch", 0),
        Arm("ours, gate=none", ungated.step, ungated.path, 0),
        Arm("ours, float32 states", plain.step, plain.path, 0, 1.20),
    ]


def statistics(params: list[torch.nn.Parameter]) -> list[Arm]:
    """As many steps as lie between two samples, with one sample and without."""
    never, sampled = ours(params), ours(params, collect_stats_every=STATS_EVERY)
    return [
        Arm("ours, no statistics", never.step, never.path, 0, steps=STATS_EVERY),
        Arm("ours, statistics", sampled.step, sampled.path, 0, 1.01, steps=STATS_EVERY),
    ]


def low_precision(params: list[torch.nn.Parameter]) -> list[Arm]:
    """Bfloat16 parameters and states against float32 copies of the parameters."""
    shadow = [torch.nn.Parameter(p.detach().clone()) for p in params]
    low = [torch.nn.Parameter(p.detach().to(BF16)) for p in params]
    for a, b, p in zip(shadow, low, params, strict=True):
        a.grad, b.grad = p.grad, p.grad.to(BF16)
    base = torch.optim.AdamW(shadow, lr=1e-6, fused=True)
    rounded = ours(low, state_dtype="bfloat16")
    copies = [torch.empty_like(p) for p in low]

    def step_and_copy() -> None:
        base.step()
        with torch.no_grad():
            torch._foreach_copy_(copies, shadow)

    return [
        Arm("AdamW fused, float32 copies", step_and_copy, "torch", 34),
        Arm("ours, bfloat16 all", rounded.step, rounded.path, 20),
    ]


def cases(quick: bool) -> list[Case]:
    """All cases; the quick form has the same rows and fewer parameters."""
    if quick:
        tiny = transformer(64, 2, 500)
        return [
            Case("float32", tiny, large, 0),
            Case("small tensors", [(64,)] * 50, small, 0),
            Case("statistics", tiny, statistics, 0),
            Case("low precision", tiny, low_precision, 0),
        ]
    gpt2 = transformer(768, 12, 50257)  # 1.2e8
    return [
        Case("float32", gpt2, large, 46),
        Case("float32", transformer(2048, 18, 50257), large, 46),  # 1.0e9
        Case("small tensors", [(4096,)] * 2000, small, 40),
        Case("statistics", gpt2, statistics, 32),
        Case("low precision", gpt2, low_precision, 40),
    ]


def milliseconds(arm: Arm) -> float:
    """Device time of an arm's steps, from an idle device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(arm.steps):
        arm.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / arm.steps


def measure(case: Case, rounds: int, time_of: Callable[[Arm], float], device: str) -> list[dict]:
    """Rows of one case."""
    params = [torch.nn.Parameter(torch.randn(s, device=device) * 0.02) for s in case.shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    arms = case.build(params)
    times: list[list[float]] = [[] for _ in arms]
    for round_ in range(rounds + 3):  # three rounds of warm-up, where kernels are compiled
        for index in random.sample(range(len(arms)), len(arms)):
            elapsed = time_of(arms[index])
            if round_ >= 3:
                times[index].append(elapsed)
    numel = sum(param.numel() for param in params)
    rows = []
    for arm, taken in zip(arms, times, strict=True):
        ratios = sorted(t / b for t, b in zip(taken, times[0], strict=True))
        median, median_ms = ratios[len(ratios) // 2], sorted(taken)[len(taken) // 2]
        decides = arm.target is not None and "fused" in arm.path
        rows.append(
            {
                "case": case.name,
                "arm": arm.name,
                "path": arm.path,
                "ratio_median": round(median, 3),
                "ratio_p10": round(ratios[len(ratios) // 10], 3),
                "ratio_p90": round(ratios[-1 - len(ratios) // 10], 3),
                "target": arm.target or "",
                "target_met": median <= arm.target if decides else "",
                "median_ms": round(median_ms, 4),
                "gb_per_s": round(arm.bytes_per_parameter * numel / median_ms / 1e6) or "",
                "rounds": rounds,
                "parameters": numel,
                "tensors": len(params),
            }
        )
    return rows


def main() -> None:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="tiny tensors, for tests")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: no CUDA device")
        return
    torch.manual_seed(0)
    random.seed(0)
    properties = torch.cuda.get_device_properties(0)
    about = {
        "triton": importlib.metadata.version("triton"),
        "toolkit": torch.version.cuda or f"hip {torch.version.hip}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9),
    }
    rows = []
    for case in cases(args.quick):
        needed = case.bytes_needed * sum(torch.Size(s).numel() for s in case.shapes)
        if needed > torch.cuda.mem_get_info()[0]:
            print(f"left out: {case.name} needs {needed / 1e9:.0f} GB of free device memory")
            continue
        for row in measure(case, 3 if args.quick else 50, milliseconds, "cuda"):
            rows.append({**row, **about})
            print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    write_csv(args.out / f"{result_name()}.csv", rows)


if __name__ == "__main__":
    main()
