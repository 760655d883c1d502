"""Paired times: what a thing adds is a ratio of neighbours in time, never a time by itself."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

__all__ = ["block_interval", "blocks", "llama", "ratio_row", "seconds", "shuffled"]

Block = TypeVar("Block")


def llama(quick: bool) -> nn.Module:
    """4.2 million parameters in 39 tensors, of the shape of a real one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = (64, 1) if quick else (256, 4)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=hidden,
            intermediate_size=hidden * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def seconds(step: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one step, on a clock: `time.perf_counter` (wall) or `time.process_time` (CPU)."""
    start = clock()
    step()
    return clock() - start


def shuffled(keys: Sequence[Block], rounds: int, seed: int = 0) -> list[list[Block]]:
    """An order for each round: what ran before decides what a step finds in the caches."""
    draw = random.Random(seed)
    return [draw.sample(keys, len(keys)) for _ in range(rounds)]


def ratio_row(ratios: Sequence[float], digits: int = 3, name: str = "ratio") -> dict[str, float]:
    """Median of paired ratios, with the 10 % and 90 % points."""
    x = sorted(ratios)
    return {
        name: round(statistics.median(x), digits),
        "ratio_p10": round(x[len(x) // 10], digits),
        "ratio_p90": round(x[-1 - len(x) // 10], digits),
    }


def blocks(values: Sequence[Block], size: int) -> list[Sequence[Block]]:
    """Consecutive parts: neighbours share what else the machine does."""
    return [values[i : i + size] for i in range(0, len(values), size)]


def block_interval(
    parts: Sequence[Block], statistic: Callable[[list[Block]], float], draws: int = 1000
) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of resampled blocks."""
    draw = random.Random(0)
    found = sorted(statistic(draw.choices(parts, k=len(parts))) for _ in range(draws))
    return found[draws // 40], found[-1 - draws // 40]
