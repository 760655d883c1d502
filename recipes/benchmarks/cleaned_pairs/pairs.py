"""Preference pairs of each seed, labelled, with labels swapped as a condition says.

A member is one condition and one seed. All conditions of a seed share prompts, completions and the
order of the rows that are flipped: at 10 % they are a part of those at 30 %.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.cleaned_pairs.language import LONGEST, all_prompts, lengths, reward
from benchmarks.cleaned_pairs.model import Params, completion_log_probs, sample
from torch import Tensor

__all__ = ["ANNOTATOR_RATES", "Sizes", "Task", "build", "log_probs_of"]

ANNOTATOR_RATES = (0.05, 0.2, 0.5)
LENGTH_BIAS = 0.3  # probability that the longer completion is preferred, whatever the reward
TEMPERATURE = 0.5  # of Bradley-Terry labels
GAP = 0.75  # two samples whose rewards differ by less are a tie, and drawn again ...
DRAWS = 6  # ... so often


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one seed. Candidates are a few more than pairs, since some only ever give ties."""

    train: int = 960
    held: int = 500
    sampled: int = 300
    candidates: float = 1.1


@dataclass(kw_only=True)
class Task:
    """All members, stacked. M members, n training pairs, H held-out pairs, Q prompts to sample."""

    conditions: list[str]  # (M,)
    seeds: list[int]  # (M,)
    reference: Params
    prompts: Tensor  # (M, n, 6)
    chosen: Tensor  # (M, n, 11)
    rejected: Tensor  # (M, n, 11)
    reference_margin: Tensor  # (M, n), log-ratio of the reference: chosen minus rejected
    flipped: Tensor  # (M, n), bool: chosen has the lower true reward
    annotator: Tensor  # (M, n)
    noise_rate: Tensor  # (M,), share of flipped rows
    held_prompts: Tensor  # (M, H, 6)
    held_better: Tensor  # (M, H, 11)
    held_worse: Tensor  # (M, H, 11)
    held_reference: Tensor  # (M, H, 2), log-probabilities of better and worse
    query: Tensor  # (M, Q, 6)
    draws: Tensor  # (M, Q, 11), uniform
    reward_sd: Tensor  # (M,), of the reference's samples


def build(
    conditions: list[str], seeds: list[int], reference: Params, sizes: Sizes | None = None
) -> Task:
    """Sample, label and flip.

    Args:
        conditions: "flips 30" (per cent, hard labels), "bt 30" (the same on Bradley-Terry labels),
            "length" or "annotators".
        seeds: One data set for each.
        reference: SFT parameters, one member for each seed.
        sizes: Numbers of pairs and prompts.
    """
    sizes = Sizes() if sizes is None else sizes
    bases = [_base(seed, _member(reference, place), sizes) for place, seed in enumerate(seeds)]
    rows = [_labelled(c, s, b) for c in conditions for s, b in zip(seeds, bases, strict=True)]
    place = torch.tensor([i for _ in conditions for i in range(len(seeds))])
    return Task(
        conditions=[c for c in conditions for _ in seeds],
        seeds=[s for _ in conditions for s in seeds],
        reference={name: p[place] for name, p in reference.items()},
        **{name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )


def log_probs_of(params: Params, prompts: Tensor, completions: Tensor, chunk: int = 128) -> Tensor:
    """Without gradients, in chunks that fit a cache. Shape (M, B)."""
    with torch.no_grad():
        parts = [
            completion_log_probs(params, prompts[:, i : i + chunk], completions[:, i : i + chunk])
            for i in range(0, prompts.shape[1], chunk)
        ]
    return torch.cat(parts, 1)


def _member(params: Params, place: int) -> Params:
    return {name: p[place : place + 1] for name, p in params.items()}


def _base(seed: int, reference: Params, sizes: Sizes) -> dict[str, Tensor]:
    """Two samples for each prompt of a seed, without ties; shapes without the member axis."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    prompts = torch.tensor(np.random.default_rng(seed).permutation(all_prompts()))
    train, held = int(sizes.train * sizes.candidates), int(sizes.held * sizes.candidates)
    assert train + held + sizes.sampled <= len(prompts)
    asked = prompts[: train + held]
    two = torch.zeros(2, len(asked), LONGEST, dtype=asked.dtype)
    rewards = torch.zeros(2, len(asked))
    for _ in range(DRAWS):
        ties = torch.nonzero((rewards[0] - rewards[1]).abs() < GAP).flatten()
        for k in range(2):
            draws = torch.rand(1, len(ties), LONGEST, generator=generator)
            two[k, ties] = sample(reference, asked[None, ties], draws)[0]
            rewards[k, ties] = reward(asked[ties], two[k, ties])
    log_probs = torch.stack([log_probs_of(reference, asked[None], y[None])[0] for y in two])
    distinct = (rewards[0] - rewards[1]).abs() >= GAP
    kept = torch.cat(
        [
            torch.nonzero(distinct[:train]).flatten()[: sizes.train],
            train + torch.nonzero(distinct[train:]).flatten()[: sizes.held],
        ]
    )
    assert len(kept) == sizes.train + sizes.held, f"only {len(kept)} pairs are no ties"
    return {
        "prompts": asked[kept],
        "first": two[0][kept],
        "second": two[1][kept],
        "rewards": rewards[:, kept],
        "log_probs": log_probs[:, kept],
        "query": prompts[train + held : train + held + sizes.sampled],
        "draws": torch.rand(sizes.sampled, LONGEST, generator=generator),
        "reward_sd": rewards.std(),
        "train": torch.tensor(sizes.train),
    }


def _labelled(condition: str, seed: int, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of a member: which completion is chosen, and whether that is wrong."""
    n = int(base["train"])
    better = base["rewards"][0] > base["rewards"][1]
    annotator = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(31 + seed))
    label = better.clone()
    label[:n] = _labels(condition, seed, {k: v for k, v in base.items()}, better[:n], annotator)

    def pick(one: Tensor, two: Tensor) -> Tensor:
        return torch.where(label[:, None], one, two)

    chosen = pick(base["first"], base["second"])
    rejected = pick(base["second"], base["first"])
    log_probs = pick(base["log_probs"].T, base["log_probs"].flip(0).T)
    flipped = label[:n] != better[:n]
    return {
        "prompts": base["prompts"][:n],
        "chosen": chosen[:n],
        "rejected": rejected[:n],
        "reference_margin": log_probs[:n, 0] - log_probs[:n, 1],
        "flipped": flipped,
        "annotator": annotator,
        "noise_rate": flipped.float().mean(),
        "held_prompts": base["prompts"][n:],
        "held_better": chosen[n:],
        "held_worse": rejected[n:],
        "held_reference": log_probs[n:],
        "query": base["query"],
        "draws": base["draws"],
        "reward_sd": base["reward_sd"],
    }


def _labels(
    condition: str, seed: int, base: dict[str, Tensor], better: Tensor, annotator: Tensor
) -> Tensor:
    """Whether the first completion is labelled as chosen."""
    n = len(better)
    generator = torch.Generator().manual_seed(30_000 + seed)
    order = torch.randperm(n, generator=generator)
    uniform = torch.rand(n, generator=generator)
    if condition == "length":
        one, two = lengths(base["first"][:n]), lengths(base["second"][:n])
        return torch.where((uniform < LENGTH_BIAS) & (one != two), one > two, better)
    if condition == "annotators":
        return better ^ (uniform < torch.tensor(ANNOTATOR_RATES)[annotator])
    found = re.fullmatch(r"(flips|bt) (\d+)", condition)
    if found is None:
        raise ValueError(f"Invalid condition: {condition!r}.")
    if found[1] == "bt":
        gap = (base["rewards"][0] - base["rewards"][1])[:n] / base["reward_sd"]
        better = uniform < torch.sigmoid(gap / TEMPERATURE)
    swapped = torch.zeros(n, dtype=torch.bool)
    swapped[order[: round(n * int(found[2]) / 100)]] = True
    return better ^ swapped
