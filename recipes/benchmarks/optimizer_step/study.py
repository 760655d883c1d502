"""Step time and state size of PopRiskAdamW's paths and of rivals, paired with AdamW(fused=True).

`--part sources`: every noise source and grain. `--part llama`: share of the optimizer in a whole
training step. `--part compile_time`: the first fused step in a new process. Resumable: cells in
today's result file are not measured again.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.harness.figures import plt, save
from benchmarks.harness.provenance import read_csv, result_name, write_csv
from benchmarks.harness.timing import ratio_row, seconds

from poprisk_integrations import PopRiskAdamW

__all__ = ["ARMS", "Arm"]

TAKES = ("part",)
BASE = "AdamW fused"
ADAMW_BYTES = 28  # p, m, v read and written, g read; float32
SIZES = {"1M": 1 << 20, "20M": 20 << 20, "100M": 100 << 20}
STATISTICS, EVERY = "ours, fused, statistics every 50", 50
IN_LLAMA = (
    *(BASE, "AdamW for-loop", "ours, default", "ours, single tensor"),
    "ours, fused, temporal",
)
# The last: a nearest relative, with a second moment of deviations from the mean.
RIVALS = {
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit", {}),
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "schedulefree AdamW": ("schedulefree", "AdamWScheduleFree", {}),
    "pytorch_optimizer AdaBelief": ("pytorch_optimizer", "AdaBelief", {}),
    "optimi AdamW": ("optimi", "AdamW", {"lr": 1e-3}),
}
TEMPORAL = {"noise_source": "temporal"}
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

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Arm:
    """One optimizer: how it is made, of which dtype the parameters are, how many bytes it moves.

    `bytes`: per parameter, that one pass must read and write; None where that is not known.
    `slow`: too slow to be repeated at 100M parameters.
    """

    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    bytes: float | None = None
    dtype: torch.dtype = torch.float32
    slow: bool = False


def _adamw(**options: Any) -> Callable[[list], torch.optim.Optimizer]:
    return partial(torch.optim.AdamW, **options)


def _ours(**options: Any) -> Callable[[list], torch.optim.Optimizer]:
    return partial(PopRiskAdamW, **options)


_fused, _half = partial(_ours, fused=True), torch.bfloat16
_temporal = partial(_fused, noise_source="temporal")
ARMS = {
    BASE: Arm(_adamw(fused=True), 28),
    "AdamW for-loop": Arm(_adamw(foreach=False), slow=True),
    "AdamW foreach": Arm(_adamw(foreach=True), slow=True),
    "AdamW fused, bf16 params": Arm(_adamw(fused=True), 14, _half),
    "ours, default": Arm(_ours(), 32),
    "ours, fused": Arm(_fused(), 32),
    "ours, fused, check off": Arm(_fused(skip_nonfinite=False), 28),
    "ours, fused, gate=none": Arm(_fused(gate="none"), 32),
    "ours, fused, temporal": Arm(_temporal(), 40),
    "ours, fused, temporal, check off": Arm(_temporal(skip_nonfinite=False), 36),
    "ours, fused, rows": Arm(_temporal(granularity="row"), slow=True),
    "ours, fused, tensors of moments": Arm(_fused(granularity="tensor"), slow=True),
    "ours, fused, bf16 noise": Arm(_temporal(state_dtype={"exp_dev_sq": "bfloat16"}), 36),
    "ours, fused, bf16 states": Arm(_fused(state_dtype="bfloat16"), 24),
    "ours, fused, 8-bit states": Arm(_fused(state_dtype="8bit"), 16 + 4 * 1.0625),
    "ours, single tensor": Arm(_ours(fused=False), slow=True),
    "ours, foreach": Arm(_ours(foreach=True), slow=True),
    "ours, bf16 params": Arm(_fused(), 8 + 16, _half),
    "ours, bf16 params, bf16 states": Arm(_fused(state_dtype="bfloat16"), 8 + 8, _half),
}


def rival_arms() -> dict[str, Arm]:
    """Other packages that are installed and run on CPU; says why the others do not."""
    arms = {}
    for name, (module, attribute, options) in RIVALS.items():

        def make(params: list, module=module, attribute=attribute, options=options):
            optimizer = getattr(import_module(module), attribute)(params, **options)
            if attribute == "AdamWScheduleFree":
                optimizer.train()
            return optimizer

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                probe = torch.nn.Parameter(torch.randn(64, 128))
                probe.grad = torch.randn(64, 128)
                make([probe]).step()
        except Exception as error:  # whatever an optional package can do wrong
            lines = [*str(error).strip().splitlines(), ""]
            print(f"left out: {name} ({type(error).__name__}: {lines[0]})", flush=True)
        else:
            arms[name] = Arm(make, slow=True)
    return arms


def shapes(numel: int, layout: str) -> Shapes:
    """Shapes that add up to about `numel` elements."""
    if layout == "small":
        return [(128, 128)] * max(1, numel >> 14)
    tensors = 49 if numel >= 1 << 22 else 7
    rows = max(2, numel // 512 // tensors)
    return [(rows + (i % 3) - 1, 512) for i in range(tensors)]


def make(arm: Arm, sizes: Shapes) -> torch.optim.Optimizer:
    """The arm's optimizer with parameters and gradients; the same for the same shapes."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in sizes:
        p = torch.randn(shape, generator=generator) * 0.02
        param = torch.nn.Parameter(p.to(arm.dtype))
        param.grad = (torch.randn(shape, generator=generator) * 1e-3).to(arm.dtype)
        params.append(param)
    return arm.make(params)


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """Plain tensors inside a state entry (subclasses hold several)."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not torch.Tensor:
            names, _ = value.__tensor_flatten__()
            return [t for name in names for t in _tensors_in(getattr(value, name))]
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors_in(item)]
    return []


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of tensors in the state, per parameter."""
    found = [t for state in optimizer.state.values() for t in _tensors_in(state) if t.dim()]
    numel = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    return sum(t.numel() * t.element_size() for t in found) / numel


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
    plain, sampled = (make(Arm(_fused(collect_stats_every=every)), sizes) for every in (0, 1))

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
            optimizer = make(Arm(_fused(**options)), sizes)
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
