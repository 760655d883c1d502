"""A two-layer regression on 64 examples for transformers.Trainer: runs of a second on the CPU."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

__all__ = ["TinyModel", "Tracker", "arguments", "dataset", "train", "weights"]

# Set by the import of deepspeed, where it is installed: now, rather than in the middle of a test.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# The same, by TrainingArguments(use_cpu=True) of transformers 4.
os.environ.setdefault("ACCELERATE_USE_IPEX", "false")

EXAMPLES = 64


class TinyModel(nn.Module):
    """tanh network whose `forward` returns a loss, as Trainer expects."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 1)
        with torch.no_grad():
            for param in (self.embed.weight, self.head.weight):
                param.copy_(torch.randn(param.shape, generator=generator) / param.shape[1] ** 0.5)
            self.embed.bias.zero_()
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        prediction = self.head(self.norm(self.embed(x)).tanh()).squeeze(-1)
        return {"loss": (prediction - labels).square().mean(), "logits": prediction}


class Tracker(TrainerCallback):
    """Sees what W&B or TensorBoard would see, before the callbacks behind it."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


def dataset(examples: int = EXAMPLES, noise: float = 0.5) -> list[dict[str, torch.Tensor]]:
    """Noisy targets: a signal to learn first, and noise to memorise after."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 6, generator=generator)
    y = x[:, 0] + noise * torch.randn(examples, generator=generator)
    return [{"x": x[i], "labels": y[i]} for i in range(examples)]


def arguments(output_dir: Path | str, **changes: Any) -> TrainingArguments:
    """A quiet fp32 run of 8 steps per epoch that saves nothing.

    With window=8 and AdamW the stopping rule sees its onset at step 32.
    """
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "optim": "poprisk_adamw",
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return TrainingArguments(**{**options, **changes})


def train(
    args: TrainingArguments,
    *callbacks: TrainerCallback,
    resume: str | bool | None = None,
    cls: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    """Train the tiny model and return the trainer."""
    options = {"model": TinyModel(), "train_dataset": dataset(), **options}
    trainer = cls(args=args, callbacks=list(callbacks), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
