"""T5: a small character model, pretrained, then fine-tuned on a few texts with wrong characters."""

import pydoc_data.topics
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["CharModel", "characters", "language_task"]

LENGTH = 48


class CharModel(nn.Module):
    """Two pre-norm transformer blocks, width 64, four heads."""

    def __init__(self, vocabulary: int = 64, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Parameter(0.1 * torch.randn(vocabulary, width))
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed[x] + self.place[: x.shape[-1]]
        length = x.shape[-1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        for block in self.blocks:
            qkv = block["qkv"](block["norm1"](h)).unflatten(-1, (3, self.heads, -1))
            q, k, v = (part.transpose(-3, -2) for part in qkv.unbind(-3))
            score = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
            score = score.masked_fill(~mask, -1e9).softmax(-1)
            h = h + block["out"]((score @ v).transpose(-3, -2).flatten(-2))
            h = h + block["down"](torch.relu(block["up"](block["norm2"](h))))
        return self.head(self.norm(h))


@cache
def characters() -> np.ndarray:
    """Python's own documentation as numbers below 64: the 63 commonest characters, and others."""
    text = "\n".join(pydoc_data.topics.topics.values())
    letters, counts = np.unique(
        np.frombuffer(text.encode("ascii", "replace"), np.uint8), return_counts=True
    )
    table = np.zeros(256, dtype=np.int64)
    for place, letter in enumerate(letters[np.argsort(-counts)][:63], start=1):
        table[letter] = place
    return table[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]


@cache
def pretrained(steps: int = 400) -> dict[str, Tensor]:
    """One model, trained on the second half of the text."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    data = torch.tensor(characters())
    data = data[len(data) // 2 :]
    model = CharModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        at = torch.randint(len(data) - LENGTH - 1, (32, 1)) + torch.arange(LENGTH + 1)
        rows = data[at]
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.random.set_rng_state(state)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def language_task(seeds: range, n: int = 200, corrupted: float = 0.1):
    """Fine-tuning on 200 texts of 48 characters from the first half, 10 % of them wrong."""
    from tasks import Task, accuracy, cross_entropy, stack

    text = characters()
    half = text[: len(text) // 2]
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(5000 + seed)
        starts = rng.choice(len(half) // (LENGTH + 1), n + 150, replace=False) * (LENGTH + 1)
        clean = half[starts[:, None] + np.arange(LENGTH + 1)]
        noisy = np.where(
            rng.random(clean.shape) < corrupted, rng.integers(0, 64, clean.shape), clean
        )
        x, y = noisy[:, :-1], noisy[:, 1:]
        rows.append((x[:n], y[:n], x[n:], y[n:], clean[n:, 1:]))
    x, y, test_x, test_y, clean = stack(rows)
    return Task(
        name="T5",
        members=[{"condition": "10% wrong", "seed": s} for s in seeds],
        model=CharModel,
        loss=cross_entropy,
        train=(x, y),
        test=(test_x, test_y),
        clean=clean,
        metric=accuracy,
        epochs=20,
        init=pretrained(),
    )
