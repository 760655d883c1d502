"""The small transformer of Power et al. (arXiv:2201.02177), for vmap, answering at one position."""

import torch
from torch import Tensor, nn

__all__ = ["DivisionModel"]

LENGTH = 4  # a, op, b, =


class DivisionModel(nn.Module):
    """Post-norm decoder without biases, ReLU, MLP of four widths; the answer is read at "=".

    Only what reaches the answer is computed: the last block attends from the last position alone.
    With one layer, keys and values depend on token and position, so they are made once for the
    2p + 2 pairs that occur instead of for each example; the result is the same.

    Args:
        p: Modulus. Tokens are 0..p-1, op = p, "=" = p + 1; answers are 0..p-1.
        width: Of the residual stream.
        layers: Blocks.
        heads: Attention heads.
    """

    def __init__(self, p: int, width: int = 64, layers: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.p, self.heads = p, heads
        self.embed = nn.Parameter(torch.randn(p + 2, width) / width**0.5)
        self.place = nn.Parameter(torch.randn(LENGTH, width) / width**0.5)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "query": nn.Linear(width, width, bias=False),
                    "key": nn.Linear(width, width, bias=False),
                    "value": nn.Linear(width, width, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "norm1": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width, bias=False),
                    "down": nn.Linear(4 * width, width, bias=False),
                    "norm2": nn.LayerNorm(width),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, p, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, p), of tokens of shape (B, 4)."""
        if len(self.blocks) == 1:
            return self.head(self._only_block(x))
        h = self.embed[x] + self.place
        for depth, block in enumerate(self.blocks):
            asking = h[:, -1:] if depth == len(self.blocks) - 1 else h
            h = self._finish(block, asking, self._attend(block, asking, h))
        return self.head(h[:, 0])

    def _attend(self, block: nn.ModuleDict, asking: Tensor, h: Tensor) -> Tensor:
        q, k, v = (
            block[name](source).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for name, source in (("query", asking), ("key", h), ("value", h))
        )
        score = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=h.device).tril()
        score = score.masked_fill(~seen[-q.shape[-2] :], -1e9).softmax(-1)
        return (score @ v).transpose(-3, -2).flatten(-2)

    def _finish(self, block: nn.ModuleDict, asking: Tensor, mixed: Tensor) -> Tensor:
        h = block["norm1"](asking + block["out"](mixed))
        return block["norm2"](h + block["down"](torch.relu(block["up"](h))))

    def _only_block(self, x: Tensor) -> Tensor:
        p, block, place = self.p, self.blocks[0], self.place
        numbers, op, equals = self.embed[:p], self.embed[p : p + 1], self.embed[p + 1 :]
        rows = torch.cat([numbers + place[0], op + place[1], numbers + place[2], equals + place[3]])
        k, v = (block[name](rows).unflatten(-1, (self.heads, -1)) for name in ("key", "value"))
        q = block["query"](rows[-1]).unflatten(-1, (self.heads, -1))
        score = (k * q).sum(-1) / q.shape[-1] ** 0.5  # (2p + 2, heads)
        first, second = x[:, 0], p + 1 + x[:, 2]
        seen = [score[first], score[p].expand(len(x), -1)]
        seen += [score[second], score[-1].expand(len(x), -1)]
        share = torch.stack(seen).softmax(0)[..., None]  # (4, B, heads, 1)
        mixed = share[0] * v[first] + share[1] * v[p] + share[2] * v[second] + share[3] * v[-1]
        return self._finish(block, rows[-1], mixed.flatten(-2))
