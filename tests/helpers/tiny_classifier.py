"""A three-class problem with wrong labels for transformers.Trainer, whose model keeps a diary."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.helpers import tiny_trainer

__all__ = ["Classifier", "Seen", "arguments", "dataset", "train"]

EXAMPLES = 120


class Seen(NamedTuple):
    """A forward pass: which examples, what each lost, and whether it makes a gradient."""

    indices: list[int]
    losses: torch.Tensor
    trains: bool


class Classifier(nn.Module):
    """One hidden layer; options make it depend on the batch and on random numbers."""

    def __init__(self, *, width: int = 32, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for layer in (self.first, self.last):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
                layer.weight.div_(layer.weight.shape[1] ** 0.5)
                layer.bias.zero_()
        self.seen: list[Seen] = []

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        logits = self.last(self.dropout(self.norm(self.first(x)).relu()))
        if labels is None:
            return {"logits": logits}
        if index is not None:
            logs = torch.log_softmax(logits.detach().float(), -1)
            losses = -logs[torch.arange(len(labels)), labels]
            self.seen.append(Seen(index.tolist(), losses, torch.is_grad_enabled()))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def dataset(examples: int = EXAMPLES, wrong: float = 0.0) -> list[dict[str, torch.Tensor]]:
    """Rows with their own number; a share of the labels is drawn at random."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 6, generator=generator)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    drawn = torch.randint(0, 3, (examples,), generator=generator)
    labels = torch.where(torch.rand(examples, generator=generator) < wrong, drawn, labels)
    return [{"x": x[i], "labels": labels[i], "index": torch.tensor(i)} for i in range(examples)]


def arguments(output_dir: Path | str, **changes: Any) -> TrainingArguments:
    """Three epochs of 15 steps."""
    options = {"num_train_epochs": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    return tiny_trainer.arguments(output_dir, **{**options, **changes})


def train(
    args: TrainingArguments,
    *callbacks: TrainerCallback,
    resume: str | bool | None = None,
    cls: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    """Train the classifier and return the trainer."""
    options = {"model": Classifier(), "train_dataset": dataset(), **options}
    trainer = cls(args=args, callbacks=list(callbacks), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
