"""Share of the optimizer in a whole training step of a small Llama.

Usage: python recipes/benchmarks/optimizer_step/llama.py [--out DIR] [--quick]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from arms import BASE, our_arms, torch_arms
from reporting import result_name, write_csv

CHOSEN = (
    BASE,
    "AdamW for-loop",
    "ours, default",
    "ours, single tensor",
    "ours, fused, bf16 noise",
)


def build(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    args = parser.parse_args()
    hidden, layers, rounds = (64, 1, 2) if args.quick else (384, 8, 12)
    arms = {**torch_arms(), **our_arms()}
    models = {name: build(hidden, layers) for name in CHOSEN}
    optimizers = {name: arms[name].make(list(models[name].parameters())) for name in CHOSEN}
    tokens = torch.randint(0, 8192, (4, 128))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CHOSEN}
    for round_ in range(rounds + 2):
        for name in CHOSEN:
            start = time.perf_counter()
            models[name](input_ids=tokens, labels=tokens).loss.backward()
            middle = time.perf_counter()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if round_ >= 2:
                times[name].append((middle - start, time.perf_counter() - middle))
    base = [a + b for a, b in times[BASE]]
    rows = []
    for name in CHOSEN:
        shares = [b / (a + b) for a, b in times[name]]
        wholes = [(a + b) / c for (a, b), c in zip(times[name], base, strict=True)]
        row = {
            "arm": name,
            "path": getattr(optimizers[name], "path", ""),
            "optimizer_share": round(statistics.median(shares), 4),
            "step_ratio": round(statistics.median(wholes), 3),
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "tensors": len(list(models[name].parameters())),
            "tokens": tokens.numel(),
            "rounds": rounds,
            "threads": torch.get_num_threads(),
        }
        rows.append(row)
        print(row, flush=True)
    write_csv(args.out / f"llama_{result_name()}.csv", rows)


if __name__ == "__main__":
    main()
