"""One training at one rate, and what each rule suggests before it: all under Lightning."""

import contextlib
import io
import json
import logging
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from benchmarks.learning_rate.tasks import SETTINGS, Setting
from benchmarks.ordinary_use.data import Task
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskLearningRateFinder

__all__ = ["GRIDS", "OWN_RATE", "record"]

WARM_UP = 0.05  # of the run's steps
# Factors of two; the gate's best rates were expected above AdamW's.
GRIDS = {
    "AdamW": [1e-3 * 2.0**k for k in range(-6, 8)],
    "PopRiskAdamW": [1e-3 * 2.0**k for k in range(-4, 8)],
    "SGD": [1e-3 * 2.0**k for k in range(0, 11)],
}
OWN_RATE = {"Prodigy": 1.0, "ScheduleFree": 0.0025}  # optimizers that are said to need no search
SWEEP = 100  # steps of Lightning's range test


class Run(pl.LightningModule):
    """A task under a schedule of linear decay after a warm-up."""

    def __init__(self, task: Task, optimizer: str, lr: float, steps: int) -> None:
        super().__init__()
        self.task, self.kind, self.lr, self.steps = task, optimizer, lr, steps
        self.model = task.model()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        *x, y = batch
        inputs = tuple(x)
        if self.task.augment is not None:
            inputs = self.task.augment(inputs, torch.default_generator)
        return self.task.loss(self.model(inputs), y)[0].mean()

    def configure_optimizers(self) -> Any:
        params = [p for p in self.model.parameters() if p.requires_grad]
        warm = max(1, round(WARM_UP * self.steps))
        if self.kind == "ScheduleFree":
            from schedulefree import AdamWScheduleFree

            return AdamWScheduleFree(params, lr=self.lr, weight_decay=0.01, warmup_steps=warm)
        if self.kind == "Prodigy":
            from prodigyopt import Prodigy

            optimizer = Prodigy(params, lr=self.lr, weight_decay=0.01)
        elif self.kind == "SGD":
            optimizer = torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=1e-4)
        else:
            cls = {"AdamW": torch.optim.AdamW, "PopRiskAdamW": PopRiskAdamW}[self.kind]
            optimizer = cls(params, lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min(1.0, (k + 1) / warm) * max(0.0, 1 - k / self.steps)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_epoch_start(self) -> None:
        self._optimizer_mode("train")

    def on_train_end(self) -> None:
        self._optimizer_mode("eval")

    def _optimizer_mode(self, mode: str) -> None:
        if self.kind == "ScheduleFree":
            getattr(self.optimizers().optimizer, mode)()

    @torch.no_grad()
    def held_out_loss(self, is_squared: bool) -> float:
        """On test examples whose labels are as those of training are."""
        self.eval()
        test, losses = self.task.noisy, []
        for rows in torch.arange(len(test)).split(256):
            part = test.part(rows)
            losses.append(self.task.loss(self.model(part.x), part.y)[0])
        mean = float(torch.cat(losses).mean())
        return math.sqrt(mean) if is_squared and math.isfinite(mean) else mean


def _module(setting: Setting, task: Task, seed: int, optimizer: str, lr: float) -> tuple[Run, Any]:
    """A fresh model and its loader, the same for every optimizer and rate."""
    pl.seed_everything(seed, verbose=False)
    data = TensorDataset(*task.train.x, task.train.y)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, setting.batch, shuffle=True, drop_last=True, generator=order)
    return Run(task, optimizer, lr, setting.epochs * len(loader)), loader


def _trainer(setting: Setting, folder: str, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        **options,
    )


def train(setting: Setting, task: Task, seed: int, optimizer: str, lr: float) -> float:
    """Held-out loss at the end; that of the untrained model where the training failed."""
    module, loader = _module(setting, task, seed, optimizer, lr)
    untrained = module.held_out_loss(setting.is_squared)
    module.train()
    with TemporaryDirectory() as folder:
        _trainer(setting, folder).fit(module, loader)
    loss = module.held_out_loss(setting.is_squared)
    return min(loss, untrained) if math.isfinite(loss) else untrained


def suggestions(setting: Setting, task: Task, seed: int, optimizer: str) -> dict[str, Any]:
    """What each rule suggests, and the steps that it took."""
    module, loader = _module(setting, task, seed, optimizer, setting.default)
    finder = PopRiskLearningRateFinder()
    with TemporaryDirectory() as folder:
        _Stop.run(_trainer(setting, folder, callbacks=[finder, _Stop()]), module, loader)
    found = finder.results
    assert found is not None
    trained = len(found.candidates) * (found.steps + found.score_batches)
    ours = {
        "lr": found.suggested,
        "low": found.low,
        "high": found.high,
        "steps": trained,
        "length": found.steps,
        "tried": len(found.candidates),
        "candidates": [[c.rate, c.loss] for c in found.candidates],
    }
    if optimizer == "PopRiskAdamW":
        return {"finder": ours}
    module, loader = _module(setting, task, seed, optimizer, setting.default)
    with TemporaryDirectory() as folder:
        tuner = Tuner(_trainer(setting, folder))
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            sweep = tuner.lr_find(module, loader, num_training=SWEEP, update_attr=False)
    lrs, losses = sweep.results["lr"], _unbiased(sweep.results["loss"])
    return {
        "finder": ours,
        # None: it found no gradient to follow, and the default stays.
        "lr_find": {"lr": sweep.suggestion() or setting.default, "steps": SWEEP},
        "minimum/10": {"lr": lrs[_argmin(losses)] / 10, "steps": SWEEP},
        "valley": {"lr": lrs[_valley(losses)], "steps": SWEEP},
        "default": {"lr": setting.default, "steps": 0},
    }


class _Stop(pl.Callback):
    """Ends a fit that was begun for its finder alone."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise _Found

    @staticmethod
    def run(trainer: pl.Trainer, module: Run, loader: Any) -> None:
        try:
            trainer.fit(module, loader)
        except _Found:
            return


class _Found(Exception):
    pass


def _unbiased(smoothed: Sequence[float], beta: float = 0.98) -> list[float]:
    """Lightning divides its running mean by 1 - beta^(k + 1) at step k: too little at first."""
    steps = range(1, len(smoothed) + 1)
    shares = [(1 - beta ** (k + 1)) / (1 - beta**k) for k in steps]
    return [loss * share for loss, share in zip(smoothed, shares, strict=True)]


def _argmin(losses: Sequence[float]) -> int:
    skip = len(losses) // 10
    return skip + min(range(len(losses) - skip), key=lambda i: losses[skip + i])


def _valley(losses: Sequence[float]) -> int:
    """Half of the way down the longest subsequence that falls, as fastai's `valley` has it."""
    count = len(losses)
    longest = [1] * count
    end = 0
    for i in range(1, count):
        for j in range(i):
            if losses[i] < losses[j]:
                longest[i] = max(longest[i], longest[j] + 1)
        if longest[end] < longest[i]:
            end = i
    start = end - longest[end]
    third = (end - start) / 3
    return min(count - 1, max(0, start + int(third) + int(third / 2)))


def record(
    name: str, seed: int, folder: Path, grids: dict[str, Sequence[float]], rivals: Sequence[str]
) -> Path:
    """All runs of a task and seed, written after each one; what is there is not run again.

    `rivals`: of `OWN_RATE`, those that are run.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    setting = SETTINGS[name]
    path = folder / f"{name}_{seed}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    task = setting.make(seed)

    def keep(key: str, value: Any) -> None:
        found[key] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(path)

    def loss_at(optimizer: str, lr: float) -> None:
        key = f"{optimizer} {lr:.6g}"
        if key not in found:
            began = time.monotonic()
            loss = train(setting, task, seed, optimizer, lr)
            keep(key, loss)
            print(f"{name} {seed} {key}: {loss:.4g}, {time.monotonic() - began:.0f} s", flush=True)

    kinds = ["SGD"] if setting.optimizer == "SGD" else ["AdamW", "PopRiskAdamW"]
    for optimizer in kinds:
        if f"{optimizer} suggestions" not in found:
            keep(f"{optimizer} suggestions", suggestions(setting, task, seed, optimizer))
        for rule in found[f"{optimizer} suggestions"].values():
            loss_at(optimizer, rule["lr"])
        for lr in grids.get(optimizer, ()):
            loss_at(optimizer, lr)
    if setting.optimizer == "AdamW":
        for optimizer in rivals:
            loss_at(optimizer, OWN_RATE[optimizer])
        # What someone gets who keeps AdamW's suggestion when switching the gate on.
        loss_at("PopRiskAdamW", found["AdamW suggestions"]["finder"]["lr"])
    return path
