"""A small Llama trained from scratch on Python's own documentation, several epochs of it."""

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from gate_harness.tasks import Member, Params, Task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["SIZES", "LanguageTask", "Size", "split_text", "token_ids", "windows"]

HELD_OUT = 0.1  # of the text, at its end


@dataclass(frozen=True, kw_only=True)
class Size:
    """Model and run of a size.

    Args:
        hidden: Width.
        inner: Width within the feed-forward block.
        layers: Blocks.
        heads: Of attention.
        vocabulary: Entries of the byte-pair encoding.
        length: Tokens of a window.
        batch_size: Windows per step.
        steps: Of the run.
        evaluations: Evenly spaced over the run.
        rows: Windows that are trained on.
        measured: Of these and of the held-out windows, those that the loss is measured on.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch_size: int
    steps: int
    evaluations: int
    rows: int
    measured: tuple[int, int]


SIZES = {
    "tiny": Size(
        hidden=16,
        inner=32,
        layers=1,
        heads=2,
        vocabulary=300,
        length=16,
        batch_size=4,
        steps=24,
        evaluations=2,
        rows=32,
        measured=(8, 16),
    ),
    "400k": Size(
        hidden=96,
        inner=256,
        layers=3,
        heads=4,
        vocabulary=512,
        length=64,
        batch_size=8,
        steps=384,
        evaluations=6,
        rows=1024,
        measured=(32, 128),
    ),
    "1m": Size(
        hidden=160,
        inner=432,
        layers=3,
        heads=4,
        vocabulary=512,
        length=64,
        batch_size=8,
        steps=384,
        evaluations=6,
        rows=1024,
        measured=(32, 128),
    ),
    "10m": Size(
        hidden=320,
        inner=864,
        layers=8,
        heads=8,
        vocabulary=1024,
        length=128,
        batch_size=16,
        steps=272,
        evaluations=8,
        rows=1088,
        measured=(64, 112),
    ),
}


def split_text() -> tuple[str, str]:
    """Training part and held-out end of the text, 0.46 MB of English in all."""
    text = "\n".join(pydoc_data.topics.topics.values())
    at = round(len(text) * (1 - HELD_OUT))
    return text[:at], text[at:]


@cache
def token_ids(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Both parts in a byte-level byte-pair encoding that is learned from the training part."""
    train, held_out = split_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([train], trainer)
    return torch.tensor(tokenizer.encode(train).ids), torch.tensor(tokenizer.encode(held_out).ids)


def windows(ids: Tensor, length: int) -> Tensor:
    """Inputs and their successors side by side, shape (N, length + 1); neighbours share a token.

    Each token but the first is predicted once; what does not fill a window is dropped.
    """
    return ids.unfold(0, length + 1, length)


class LanguageTask(Task):
    """Next-token prediction; batches without replacement, epoch by epoch.

    Args:
        members: The models; only their seeds and rates differ.
        size: Of model and run.
        device: Of parameters and data.
        attention: Implementation, as in `transformers`.
    """

    def __init__(
        self,
        members: list[Member],
        size: Size,
        *,
        device: str = "cpu",
        attention: str = "sdpa",
    ) -> None:
        self.members, self.size, self.device, self.attention = members, size, device, attention
        self.steps = size.steps
        count = size.evaluations
        self.eval_steps: Sequence[int] = [
            round(size.steps * k / count) for k in range(1, count + 1)
        ]
        train, held_out = (windows(ids, size.length) for ids in token_ids(size.vocabulary))
        self.train = _spread(train, size.rows).to(device)
        self.measured = {
            "train_loss": _spread(self.train, size.measured[0]),
            "held_out_loss": _spread(held_out, size.measured[1]).to(device),
        }
        self.generators = {m.seed: torch.Generator().manual_seed(40_000 + m.seed) for m in members}
        self.order: dict[int, Tensor] = {}
        self.model = self.module(0)

    def module(self, seed: int) -> nn.Module:
        """A fresh model."""
        torch.manual_seed(seed)
        size = self.size
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation=self.attention,
        )
        return LlamaForCausalLM(config).to(self.device)

    def initial(self) -> Params:
        """One draw for each seed."""
        drawn = {
            seed: {name: p.detach() for name, p in self.module(seed).named_parameters()}
            for seed in dict.fromkeys(m.seed for m in self.members)
        }
        names = list(drawn[self.members[0].seed])
        return {n: torch.stack([drawn[m.seed][n] for m in self.members]) for n in names}

    def loss(self, params: Params, rows: Tensor) -> Tensor:
        """Cross-entropy per token, in nats, of one member's parameters on windows (B, L + 1)."""
        logits = functional_call(self.model, params, (), {"input_ids": rows[:, :-1]}).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def batch(self, step: int) -> dict[int, Tensor]:
        """The windows of a step for each seed; a short last batch of an epoch is dropped."""
        count, size = len(self.train), self.size.batch_size
        within = step % (count // size)
        if within == 0:
            self.order = {s: torch.randperm(count, generator=g) for s, g in self.generators.items()}
        rows = slice(within * size, (within + 1) * size)
        return {seed: self.train[order[rows].to(self.device)] for seed, order in self.order.items()}

    def losses(self, params: Params, step: int) -> Tensor:
        """Member by member: models of this size are bound by arithmetic, not by calls."""
        rows = self.batch(step)
        losses = [self.loss(p, rows[m.seed]) for m, p in self._each(params)]
        return torch.stack(losses)

    def metrics(self, params: Params) -> dict[str, Tensor]:
        """Losses on a fixed part of the training text and of the held-out text."""
        found: dict[str, Tensor] = {}
        for name, rows in self.measured.items():
            parts = rows.split(self.size.batch_size)
            assert len(rows) == len(parts) * self.size.batch_size  # a mean of means is the mean
            found[name] = torch.stack(
                [
                    torch.stack([self.loss(p, x) for x in parts]).mean()
                    for _, p in self._each(params)
                ]
            )
        return found

    def _each(self, params: Params) -> list[tuple[Member, Params]]:
        return [(m, {n: p[i] for n, p in params.items()}) for i, m in enumerate(self.members)]


def _spread(rows: Tensor, count: int) -> Tensor:
    """This many windows, evenly spaced."""
    assert count <= len(rows)
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]
