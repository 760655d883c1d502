"""Beside the table of steps: noise sources and grains, a whole training step, compilation."""

import gc
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from benchmarks.harness.timing import ratio_row, seconds
from benchmarks.optimizer_step.arms import (
    ARMS,
    BASE,
    SIZES,
    TEMPORAL,
    Arm,
    fused,
    make,
    shapes,
    state_bytes,
)

__all__ = ["PARTS"]

IN_LLAMA = (
    *(BASE, "AdamW for-loop", "ours, default", "ours, single tensor"),
    "ours, fused, temporal",
)
SOURCES = {
    "temporal": TEMPORAL,
    "temporal, check off": {"skip_nonfinite": False, **TEMPORAL},
    "moments": {},
    "moments, check off": {"skip_nonfinite": False},
    "gate=none": {"gate": "none"},
    "rows": {"granularity": "row", **TEMPORAL},
    "rows of moments": {"granularity": "row"},
    "tensors": {"granularity": "tensor", **TEMPORAL},
    "tensors of moments": {"granularity": "tensor"},
}
FIRST_STEP = """
import time, torch
from poprisk_integrations import PopRiskAdamW
p = torch.nn.Parameter(torch.randn(600, 512))
p.grad = torch.randn(600, 512)
optimizer = PopRiskAdamW([p], fused=True)
start = time.perf_counter()
optimizer.step()
print(optimizer.path, time.perf_counter() - start)
"""


def _llama(quick: bool) -> list[dict]:
    """Share of the optimizer in a whole training step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, rounds = (64, 1, 2) if quick else (384, 8, 12)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    runs = {}
    for name in IN_LLAMA:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        runs[name] = model, ARMS[name].make(list(model.parameters()))
    tokens = torch.randint(0, 8192, (4, 128))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in IN_LLAMA}
    for round_ in range(rounds + 2):
        for name, (model, optimizer) in runs.items():
            start = time.perf_counter()
            model(input_ids=tokens, labels=tokens).loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            if round_ >= 2:
                times[name].append((middle - start, time.perf_counter() - middle))
    base = [a + b for a, b in times[BASE]]
    return [
        {
            "arm": name,
            "path": getattr(optimizer, "path", ""),
            "optimizer_share": round(median(b / (a + b) for a, b in times[name]), 4),
            "step_ratio": round(
                median((a + b) / c for (a, b), c in zip(times[name], base, strict=True)), 3
            ),
            "parameters": sum(p.numel() for p in model.parameters()),
            "tensors": len(list(model.parameters())),
            "tokens": tokens.numel(),
            "rounds": rounds,
            "threads": torch.get_num_threads(),
        }
        for name, (model, optimizer) in runs.items()
    ]


def _compile_time(quick: bool) -> list[dict]:
    """The first fused step in a new process: with an empty compiler cache, then with it."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "filled"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST_STEP],
                env={**os.environ, "POPRISK_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            )
            path, taken = done.stdout.split()
            row = {"case": "all formats", "cache": state, "path": path}
            rows.append({**row, "first_step_seconds": round(float(taken), 1)})
    return rows


def _sources(quick: bool) -> list[dict]:
    """Noise sources and grains, each beside AdamW fused, on one thread and on two."""
    layouts = {
        "20M in 49": shapes(SIZES["20M"] // (256 if quick else 1), "large"),
        "2,000 of 4,096": [(64, 64)] * (20 if quick else 2000),
    }
    # of several threads the CPU's clock counts those that wait for others
    clocks = {1: {"wall": time.perf_counter, "CPU": time.process_time}}
    clocks[2] = {"wall": time.perf_counter}
    before, rows = torch.get_num_threads(), []
    for layout, sizes in layouts.items():
        base = make(ARMS[BASE], sizes)
        for name, options in SOURCES.items():
            optimizer = make(Arm(fused(**options)), sizes)
            rounds = 2 if quick else 6 if "granularity" in options else 32
            for threads, clock in ((n, clock) for n, known in clocks.items() for clock in known):
                torch.set_num_threads(threads)
                times = [
                    tuple(seconds(o.step, clocks[threads][clock]) for o in (optimizer, base))
                    for _ in range(rounds + 2)
                ][2:]
                ours, theirs = (round(1e3 * median(t), 2) for t in zip(*times, strict=True))
                rows.append(
                    {
                        "layout": layout,
                        "arm": name,
                        "path": optimizer.path,
                        "threads": threads,
                        "clock": clock,
                        **ratio_row([a / b for a, b in times]),
                        "state_bytes": round(state_bytes(optimizer), 2),
                        "milliseconds": ours,
                        "base_milliseconds": theirs,
                        "rounds": rounds,
                        "load": round(os.getloadavg()[0], 1),
                    }
                )
                print(list(rows[-1].values())[:8], flush=True)
            del optimizer
            gc.collect()
    torch.set_num_threads(before)
    return rows


PARTS = {"sources": _sources, "llama": _llama, "compile_time": _compile_time}
