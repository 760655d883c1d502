"""One small job under Lightning's Trainer and under transformers': the same model, data and order.

What a run came to is told in the same words, so that one test holds for both.
"""

import contextlib
import io
import json
import logging
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import pytorch as pl
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
)
from transformers import Trainer, TrainerCallback

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations import huggingface as hf
from poprisk_integrations import lightning as pop
from poprisk_integrations.core.risk_stopping import RiskStopping
from tests.helpers import tiny_trainer
from tests.integration.lightning import toy

FRAMEWORKS = ("lightning", "huggingface")
CLASSES = {
    ("lightning", "stop"): pop.PopRiskEarlyStopping,
    ("lightning", "cut"): pop.PopRiskLRCut,
    ("lightning", "monitor"): pop.PopRiskMonitor,
    ("huggingface", "stop"): hf.PopRiskEarlyStoppingCallback,
    ("huggingface", "cut"): hf.PopRiskLRCut,
    ("huggingface", "monitor"): hf.PopRiskMonitorCallback,
}
LR = 1e-2
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # of a test that torchrun has started


def noisy_data(n=256, flips=0.3):
    """Examples of a linear teacher; `flips` is the share of labels drawn at random."""
    return [{"x": x, "labels": y} for x, y in toy.noisy_data(n, flips)]


class Stream(IterableDataset):
    """Data without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Net(nn.Module):
    """A small MLP."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x, labels=None):
        logits = self.head(self.embed(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def adamw(params):
    return torch.optim.AdamW(params, lr=LR)


def still(params):
    return torch.optim.SGD(params, lr=0.0)


def gated(params):
    return PopRiskAdamW(params, lr=LR)


@dataclass
class Job:
    """What to train, and what to do before each step: `hook(step, model, optimizer)`."""

    ours: list[Any]
    net: Any = None
    data: Any = None
    epochs: int = 10
    batch: int = 32  # of a step, whatever it is made of
    accumulate: int = 1
    clip: float = 0.0
    precision: str = ""  # "bf16" or "fp16"
    make_optimizer: Any = adamw
    make_schedule: Any = None
    hook: Any = None
    shuffled: bool = False  # by the epoch: a run resumes at the end of one
    save_at: int | None = None
    resume: Any = None
    max_steps: int = -1


@dataclass
class Outcome:
    """What a run came to."""

    net: nn.Module
    steps: int
    rates: list[float]  # of each step
    at: dict[int, dict[str, torch.Tensor]]  # weights after each step
    lines: list[dict[str, float]]
    checkpoint: Path | None
    said: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weights(self):
        return weights_of(self.net)

    @property
    def report(self):
        (found,) = self.reports
        return found


def make(framework, kind="stop", **options):
    """A callback of ours."""
    return CLASSES[framework, kind](**options)


def numbers(ours):
    """What the rule of a stop or a cut remembers."""
    return ours.rule_state if hasattr(ours, "rule_state") else ours.state_dict()["rule"]


def weights_of(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def decide(monkeypatch, *, stop=None, best=(), keeps=False, tail=6):
    """Let the rule of "risk" say what a test wants at the windows that end at given steps."""

    def update(self, row, *, schedule=None):
        step = row["step"]
        return SimpleNamespace(
            stop=stop is not None and step >= stop,
            is_best=step in best,
            cooldown_steps=tail,
            reason=f"decided at step {step}",
        )

    monkeypatch.setattr(RiskStopping, "update", update)
    monkeypatch.setattr(RiskStopping, "keeps_best", lambda self: keeps)


def run(framework, root, *ours, **job) -> Outcome:
    """Train the job of these arguments with callbacks of ours."""
    job = Job(ours=list(ours), **job)
    job.data = noisy_data() if job.data is None else job.data
    job.net = Net() if job.net is None else job.net
    handler = _Lines()
    loggers = [logging.getLogger(n) for n in ("poprisk_integrations", "lightning.pytorch")]
    before = [logger.level for logger in loggers]
    stream = io.StringIO()
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(stream):
            warnings.simplefilter("always")
            outcome = {"lightning": _lightning, "huggingface": _huggingface}[framework](root, job)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    lines = [*handler.lines, *(str(w.message) for w in warned), *stream.getvalue().splitlines()]
    ours_only = [x for x in lines if x.startswith(("PopRisk", "poprisk: "))]
    outcome.said = [re.sub(r"^\w+: ", "", x) for x in ours_only]
    outcome.reports = [json.loads(p.read_text()) for p in sorted(root.rglob("poprisk_stop*.json"))]
    return outcome


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def _scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


class _Module(pl.LightningModule):
    def __init__(self, job):
        super().__init__()
        self.net, self._job = job.net, job

    def training_step(self, batch, batch_idx):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        optimizer = self._job.make_optimizer(self.net.parameters())
        if self._job.make_schedule is None:
            return optimizer
        schedule = {"scheduler": self._job.make_schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class ResumableLoader(DataLoader):
    """Continues in mid-epoch, as Lightning asks of loaders with `state_dict`."""

    start = position = 0

    def __iter__(self):
        self.position, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= self.position:
                self.position = (index + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.start = state_dict["position"]


class ByEpoch(Sampler):
    """Its order is that of the epoch, as Lightning resumes whole epochs."""

    epoch = 0

    def __init__(self, n: int):
        self.n = n

    def __len__(self):
        return self.n

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.n, generator=generator).tolist())


class _Snapshots(pl.Callback):
    """Before ours, which may put other weights in."""

    def __init__(self):
        self.at = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.at[trainer.global_step] = weights_of(pl_module.net)


class _Watch(pl.Callback):
    def __init__(self, root, job):
        self.path = root / "middle.ckpt"
        self.job, self.rates, self.lines = job, [], []

    def _save(self, trainer, *, is_epoch_end):
        is_due = trainer.global_step == self.job.save_at and is_epoch_end is self.job.shuffled
        if is_due and not self.path.exists():
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.job.hook is not None:
            self.job.hook(trainer.global_step, pl_module.net, trainer.optimizers[0])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *_):
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if "poprisk" in k}
        self.lines.append({"step": trainer.global_step, **found})
        self._save(trainer, is_epoch_end=False)

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, is_epoch_end=True)


def _loader(job):
    size, sampler, kind = job.batch // job.accumulate // WORLD_SIZE, None, DataLoader
    if WORLD_SIZE > 1:  # the ranks' batches join to one process's
        rank = int(os.environ["RANK"])
        sampler = DistributedSampler(job.data, WORLD_SIZE, rank, shuffle=False)
    elif job.shuffled and not isinstance(job.data, IterableDataset):
        sampler = ByEpoch(len(job.data))
    elif job.save_at or job.resume:
        kind = ResumableLoader
    return kind(job.data, batch_size=size, sampler=sampler)


def _lightning(root, job):
    watch, seen = _Watch(root, job), _Snapshots()
    settings = {"precision": "bf16-mixed"} if job.precision == "bf16" else {}
    if job.precision == "fp16":  # "16-mixed" on the CPU would be bf16-mixed
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", _scaler())]
    if WORLD_SIZE > 1:
        settings["strategy"] = DDPStrategy(process_group_backend="gloo")
        settings |= {"devices": WORLD_SIZE, "use_distributed_sampler": False}
    trainer = toy.trainer(
        root,
        [seen, *job.ours, watch],
        logger=pl.loggers.CSVLogger(root),
        log_every_n_steps=4,
        max_epochs=job.epochs,
        max_steps=job.max_steps,
        accumulate_grad_batches=job.accumulate,
        gradient_clip_val=job.clip or None,
        **settings,
    )
    torch.manual_seed(11)
    trainer.fit(_Module(job), _loader(job), ckpt_path=job.resume)
    saved = watch.path if watch.path.exists() else None
    return Outcome(job.net, trainer.global_step, watch.rates, seen.at, watch.lines, saved)


class _Trainer(Trainer):
    job: Job

    def _get_train_sampler(self, *args):
        if self.job.shuffled:
            return super()._get_train_sampler(*args)
        return SequentialSampler(self.train_dataset)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.job.precision == "fp16":  # which accelerate leaves out on the CPU
            self.accelerator.native_amp, self.accelerator.scaler = True, _scaler()


class _Kept(TrainerCallback):
    """As `_Snapshots`."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = weights_of(model)


class _Hook(TrainerCallback):
    def __init__(self, job):
        self.job, self.rates = job, []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.job.hook is not None:
            self.job.hook(state.global_step, model, optimizer)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def _huggingface(root, job):
    hook, seen, optimizer = _Hook(job), _Kept(), job.make_optimizer(job.net.parameters())
    schedule = None if job.make_schedule is None else job.make_schedule(optimizer)
    args = tiny_trainer.arguments(
        root,
        per_device_train_batch_size=job.batch // job.accumulate // WORLD_SIZE,
        gradient_accumulation_steps=job.accumulate,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps,
        max_grad_norm=job.clip,
        optim="adamw_torch",
        save_strategy="no" if job.save_at is None else "steps",
        save_steps=job.save_at or 500,
        ddp_backend="gloo" if WORLD_SIZE > 1 else None,
        **({job.precision: True} if job.precision else {}),
    )
    trainer = type("Trainer", (_Trainer,), {"job": job})(
        model=job.net,
        args=args,
        train_dataset=job.data,
        optimizers=(optimizer, schedule),
        callbacks=[seen, *job.ours, hook],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer's own lines
        trainer.train(resume_from_checkpoint=None if job.resume is None else str(job.resume))
    path, state = root / f"checkpoint-{job.save_at}", trainer.state
    saved = path if path.is_dir() else None
    return Outcome(job.net, state.global_step, hook.rates, seen.at, state.log_history, saved)
