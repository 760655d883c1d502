"""Small models of the usual kinds; all take a tuple of input tensors."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Bag", "Cnn", "Decoder", "Encoder", "Policy", "add_lora", "mlp"]


class Mlp(nn.Module):
    """Linear layers with ReLU between, dropout before the last one."""

    def __init__(self, widths: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.dropout = dropout

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        (h,) = x
        for layer in self.layers[:-1]:
            h = F.relu(layer(h))
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        return self.layers[-1](h)


def mlp(*widths: int, dropout: float = 0.0) -> Callable[[], nn.Module]:
    """A maker of MLPs."""
    return lambda: Mlp(widths, dropout)


class Cnn(nn.Module):
    """Two 3x3 convolutions with pooling between and one hidden layer, for 8x8 images."""

    def __init__(self, width: int = 24, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * 4, 96)
        self.out = nn.Linear(96, 10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        (h,) = x
        h = F.max_pool2d(F.relu(self.first(h)), 2)
        h = F.max_pool2d(F.relu(self.second(h)), 2)
        h = F.relu(self.hidden(self.dropout(h.flatten(1))))
        return self.out(self.dropout(h))


class Bag(nn.Module):
    """Mean of the embeddings of a text's tokens, then one hidden layer."""

    def __init__(self, vocabulary: int, classes: int, width: int = 48, dropout: float = 0.1):
        super().__init__()
        self.embed = nn.EmbeddingBag(vocabulary, width, mode="mean", padding_idx=0)
        self.hidden = nn.Linear(width, 64)
        self.out = nn.Linear(64, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        (tokens,) = x
        h = self.dropout(F.relu(self.hidden(self.embed(tokens))))
        return self.out(h)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self._drop(self.mix(mixed.transpose(1, 2).flatten(2)))
        return h + self._drop(self.down(F.relu(self.up(self.norm2(h)))))

    def _drop(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout) if self.dropout and self.training else h


class Decoder(nn.Module):
    """A language model: logits of the next token, shape (B, T, V); the head is the embedding."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.05)
        for block in self.blocks:
            for layer in (block.mix, block.down):
                nn.init.normal_(layer.weight, std=0.5 / math.sqrt(2 * layers * layer.in_features))

    def hidden(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.place[: tokens.shape[1]]
        return self.norm(self.blocks(h))

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return F.linear(self.hidden(x[0]), self.embed.weight)


class Encoder(nn.Module):
    """A text classifier: a transformer that looks both ways, mean over tokens, one layer."""

    def __init__(
        self, vocabulary: int, length: int, classes: int, width: int = 48, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.body = Decoder(vocabulary, length, width, layers=2, dropout=dropout, causal=False)
        self.out = nn.Linear(width, classes)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return self.out(self.body.hidden(x[0]).mean(1))


class Policy(nn.Module):
    """DPO: beta times the log-ratio of the better minus that of the worse completion, (B,)."""

    def __init__(self, decoder: Decoder, prompt: int, beta: float = 0.1, pad: int = 0) -> None:
        super().__init__()
        self.decoder, self.prompt, self.beta, self.pad = decoder, prompt, beta, pad

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Of the completion in each row, the prompt given."""
        h = self.decoder.hidden(tokens[:, :-1])[:, self.prompt - 1 :]
        logits, targets = F.linear(h, self.decoder.embed.weight), tokens[:, self.prompt :]
        nats = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=self.pad
        )
        return -nats.view(targets.shape).sum(1)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        better, worse, reference = x
        one, two = self.log_probs(torch.cat([better, worse])).chunk(2)
        return self.beta * (one - two - reference)


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trained product of rank r, scaled by 2."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2.0 * F.linear(F.linear(x, self.down), self.up)


def add_lora(decoder: Decoder, rank: int) -> Decoder:
    """Freeze a decoder and put adapters beside the layers of its blocks."""
    decoder.requires_grad_(False)
    for block in decoder.blocks:
        for name in ("qkv", "mix", "up", "down"):
            setattr(block, name, LoraLinear(getattr(block, name), rank))
    return decoder
