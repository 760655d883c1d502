"""Preference pairs in the language of `noisy_dpo`, and a policy of 30,000 parameters."""

from pathlib import Path

import numpy as np
import torch
from benchmarks.ordinary_use.data import Examples, Task, fit, preference_loss, pretrained
from benchmarks.ordinary_use.made_up_language import (
    LONGEST,
    PAD,
    PROMPT,
    VOCABULARY,
    all_prompts,
    grammar,
    reward,
)
from benchmarks.ordinary_use.networks import Decoder, Policy
from torch import Tensor, nn

__all__ = ["preferences", "reference_policy"]

GAP = 0.75  # completions whose rewards differ by less are a tie, and drawn again
TEMPERATURE = 0.5  # of labels drawn by Bradley and Terry's rule
WIDTH, HEADS = 32, 2


def preferences(seed: int, n: int, share: float, kind: str, folder: Path, test: int = 2000) -> Task:
    """Pairs of completions of the grammar, the better one by the true reward first.

    Args:
        seed: Which pairs.
        n: Pairs to train on.
        share: Of labels that are swapped.
        kind: "swapped"; or "weak": the same after labels that follow the reward's difference
            by chance, so that the closer pairs are often wrong.
        folder: Where the reference policy is kept.
        test: Pairs.
    """
    random = np.random.default_rng(4000 + seed)
    prompts = all_prompts()[random.integers(0, len(all_prompts()), n + test)]
    two = [grammar(prompts, random) for _ in range(2)]
    score = [_reward(prompts, rows) for rows in two]
    while (ties := np.flatnonzero(np.abs(score[0] - score[1]) < GAP)).size:
        for rows, values in zip(two, score, strict=True):
            rows[ties] = grammar(prompts[ties], random)
            values[ties] = _reward(prompts[ties], rows[ties])
    first = (score[0] > score[1])[:, None]
    pairs = np.where(first, two[0], two[1]), np.where(first, two[1], two[0])
    better, worse = (torch.tensor(np.concatenate([prompts, rows], 1)) for rows in pairs)
    right = np.ones(n + test)  # chance that the label is
    if kind == "weak":
        gap = np.abs(score[0] - score[1]) / np.concatenate(score).std() / TEMPERATURE
        right = 1 / (1 + np.exp(-gap))
    label = random.random(n) < right[:n]
    label[random.choice(n, round(share * n), replace=False)] ^= True
    right = share * (1 - right) + (1 - share) * right
    weights = reference_policy(folder)

    def make() -> nn.Module:
        decoder = Decoder(VOCABULARY, PROMPT + LONGEST - 1, WIDTH, HEADS)
        decoder.load_state_dict(weights)
        return Policy(decoder, PROMPT, pad=PAD)

    with torch.no_grad(), torch.random.fork_rng():
        policy = make()
        reference = policy.log_probs(better) - policy.log_probs(worse)
    test_x = (better[n:], worse[n:], reference[n:])
    return Task(
        train=Examples(x=(better[:n], worse[:n], reference[:n]), y=torch.tensor(label).float()),
        clean=Examples(x=test_x, y=torch.ones(test)),
        noisy=Examples(x=test_x, y=torch.tensor(right[n:]).float()),
        model=make,
        loss=preference_loss,
    )


def reference_policy(folder: Path, samples: int = 20_000, epochs: int = 3) -> dict[str, Tensor]:
    """Trained on the grammar, once."""

    def train() -> nn.Module:
        torch.manual_seed(8)
        random = np.random.default_rng(9)
        prompts = all_prompts()[random.integers(0, len(all_prompts()), samples)]
        tokens = torch.tensor(np.concatenate([prompts, grammar(prompts, random)], 1))
        policy = Policy(Decoder(VOCABULARY, PROMPT + LONGEST - 1, WIDTH, HEADS), PROMPT, pad=PAD)

        def loss(rows: Tensor) -> Tensor:
            count = (tokens[rows, PROMPT:] != PAD).sum()
            return -policy.log_probs(tokens[rows]).sum() / count

        fit(policy, loss, examples=samples, batch=50, epochs=epochs)
        return policy.decoder

    return pretrained(folder / "policy.pt", train)


def _reward(prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
    return reward(torch.tensor(prompts), torch.tensor(completions)).numpy()
