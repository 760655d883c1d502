"""Step time of PopRiskAdamW(fused=True) relative to AdamW(fused=True), paired round by round."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmarks.harness.timing import ratio_row

from poprisk_integrations import PopRiskAdamW

__all__ = ["step_rows"]

BF16 = torch.bfloat16
STATS_EVERY = 50
_BF16_NOISE = {"noise_source": "temporal", "state_dtype": {"exp_dev_sq": "bfloat16"}}
Params = list[torch.nn.Parameter]


@dataclass
class Arm:
    """One optimizer of a case; the first of a case is what the others are compared with.

    `bytes`: what a step must move per parameter, the check of gradients included; 0 where bytes are
    not the question. `target`: largest median ratio that is good enough. `steps`: per measurement.
    """

    name: str
    step: Callable[[], object]
    path: str
    bytes: int = 0
    target: float | None = None
    steps: int = 1


def transformer(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameter shapes of a decoder."""
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width), (width,), (width,)]
    return [(vocabulary, width), *layer * layers]


def _ours(name: str, params: Params, bytes_: int = 0, target=None, steps: int = 1, **options):
    # the learning rate is small, since all arms share the parameters
    optimizer = PopRiskAdamW(params, lr=1e-6, fused=True, **options)
    return Arm(name, optimizer.step, optimizer.path, bytes_, target, steps)


def _adamw(params: Params) -> Arm:
    return Arm("AdamW fused", torch.optim.AdamW(params, lr=1e-6, fused=True).step, "torch", 28)


def large(params: Params) -> list[Arm]:
    """Float32 parameters."""
    return [
        _adamw(params),
        _ours("gate=none", params, 32, gate="none"),
        _ours("temporal", params, 40, 1.35, noise_source="temporal"),
        _ours("moments", params, 32, 1.20),
        _ours("bfloat16 noise", params, 36, 1.20, **_BF16_NOISE),
    ]


def small(params: Params) -> list[Arm]:
    """Many small tensors: launches and the host count, not bytes."""
    return [
        _adamw(params),
        _ours("gate=none", params, gate="none"),
        _ours("temporal", params, target=1.20, noise_source="temporal"),
        _ours("moments", params, target=1.20),
    ]


def statistics(params: Params) -> list[Arm]:
    """As many steps as lie between two samples, with one sample and without."""
    return [
        _ours("no statistics", params, steps=STATS_EVERY),
        _ours("statistics", params, 0, 1.01, STATS_EVERY, collect_stats_every=STATS_EVERY),
    ]


def low_precision(params: Params) -> list[Arm]:
    """Bfloat16 parameters and states against float32 copies of the parameters."""
    shadow = [torch.nn.Parameter(p.detach().clone()) for p in params]
    low = [torch.nn.Parameter(p.detach().to(BF16)) for p in params]
    for a, b, p in zip(shadow, low, params, strict=True):
        a.grad, b.grad = p.grad, p.grad.to(BF16)
    base = torch.optim.AdamW(shadow, lr=1e-6, fused=True)
    copies = [torch.empty_like(p) for p in low]

    def step_and_copy() -> None:
        base.step()
        with torch.no_grad():
            torch._foreach_copy_(copies, shadow)

    return [
        Arm("AdamW fused, float32 copies", step_and_copy, "torch", 34),
        _ours("bfloat16 all", low, 16, state_dtype="bfloat16"),
    ]


def cases(rehearse: bool) -> list[tuple[str, list[tuple[int, ...]], Callable, int]]:
    """Name, shapes, arms, and bytes of device memory per parameter with all arms together."""
    tiny = transformer(64, 2, 500)
    gpt2, billion = transformer(768, 12, 50257), transformer(2048, 18, 50257)  # 1.2e8 and 1.0e9
    return [
        ("float32", tiny if rehearse else gpt2, large, 66),
        ("small tensors", [(64,)] * 50 if rehearse else [(4096,)] * 2000, small, 66),
        ("statistics", tiny if rehearse else gpt2, statistics, 40),
        ("low precision", tiny if rehearse else gpt2, low_precision, 40),
        *([] if rehearse else [("float32", billion, large, 66)]),
    ]


def _milliseconds(arm: Arm, device: str) -> float:
    """Time of an arm's steps, on a device from an idle one."""
    if device == "cpu":
        began = time.perf_counter()
        for _ in range(arm.steps):
            arm.step()
        return 1e3 * (time.perf_counter() - began) / arm.steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(arm.steps):
        arm.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / arm.steps


def _measure(name: str, shapes: list, build: Callable, rounds: int, device: str) -> list[dict]:
    params = [torch.nn.Parameter(torch.randn(s, device=device) * 0.02) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    arms = build(params)
    times: list[list[float]] = [[] for _ in arms]
    for round_ in range(rounds + 3):  # three rounds of warm-up, where kernels are compiled
        for index in random.sample(range(len(arms)), len(arms)):
            elapsed = _milliseconds(arms[index], device)
            if round_ >= 3:
                times[index].append(elapsed)
    numel = sum(param.numel() for param in params)
    rows = []
    for arm, taken in zip(arms, times, strict=True):
        found = ratio_row([t / b for t, b in zip(taken, times[0], strict=True)])
        median = sorted(taken)[len(taken) // 2]
        decides = arm.target is not None and arm.path == "fused_triton"
        rows.append(
            {
                "case": name,
                "arm": arm.name,
                "path": arm.path,
                **found,
                "target": arm.target or "",
                "target_met": found["ratio"] <= arm.target if decides else "",
                "median_ms": round(median, 4),
                "gb_per_s": round(arm.bytes * numel / median / 1e6) or "",
                "rounds": rounds,
                "parameters": numel,
                "tensors": len(params),
            }
        )
        print(rows[-1], flush=True)
    return rows


def step_rows(device: str, rehearse: bool) -> list[dict]:
    """Rows of all cases that fit into the device's memory."""
    torch.manual_seed(0)
    random.seed(0)
    rows = []
    for name, shapes, build, bytes_needed in cases(rehearse):
        needed = bytes_needed * sum(torch.Size(s).numel() for s in shapes)
        if device != "cpu" and needed > torch.cuda.mem_get_info()[0]:
            print(f"left out: {name} needs {needed / 1e9:.0f} GB of free device memory")
            continue
        rows += _measure(name, shapes, build, 3 if rehearse else 50, device)
        if device != "cpu":
            torch.cuda.empty_cache()
    return rows
