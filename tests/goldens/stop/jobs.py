"""Small runs with criterion="signal" and with the learning-rate cut, under both frameworks.

The files beside this one were written by the release before the two frameworks shared their code:

    python -m tests.goldens.stop.jobs DIRECTORY

A checkpoint in the middle of a window (no pickled objects), and `end.json`: the history and the
decision with which the uninterrupted run ends.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

KINDS = ("exact", "sample", "cut")
SAVED = {"exact": 16, "sample": 16, "cut": 24}
WINDOW = {"exact": 12, "sample": 12, "cut": 16}
_EPOCHS = {"exact": 16, "sample": 16, "cut": 12}


def _data(kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 24, generator=g)
    return x, x[:, 0] + 2.0 * torch.randn(64, generator=g)


class Model(torch.nn.Module):
    """Least squares; of a cut in a valley: steep coordinates, and flat ones with a steady slope."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.steep = torch.nn.Parameter(torch.ones(8) if kind == "cut" else torch.zeros(24))
        self.flat = torch.nn.Parameter(torch.zeros(16))

    def forward(self, x, labels=None):
        if self.kind == "cut":
            bowl = 0.5 * (self.steep - 0.1 * x[:, :8]).square().sum(-1)
            loss = (bowl + 1e-3 * ((1.0 + x[:, 8:]) * self.flat).sum(-1)).mean()
        else:
            loss = (x @ self.steep + 0 * self.flat.sum() - labels).square().mean()
        return {"loss": loss, "logits": x}

    def optimizer(self):
        if self.kind == "cut":
            return torch.optim.SGD(self.parameters(), lr=1.9)
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


def _options(kind):
    if kind == "cut":
        return {"window": WINDOW[kind]}
    return {"criterion": "signal", "window": WINDOW[kind], "accumulator": kind}


def huggingface(kind, directory, resume=None, callbacks=()):
    """Train; returns our callback and the trainer."""
    from transformers import Trainer, TrainingArguments

    from poprisk_integrations import huggingface as hf

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    cls = hf.PopRiskLRCut if kind == "cut" else hf.PopRiskEarlyStoppingCallback
    ours, model = cls(**_options(kind)), Model(kind)
    args = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=8,
        num_train_epochs=_EPOCHS[kind],
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=4,
        save_steps=SAVED[kind],
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    x, y = _data(kind)
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    trainer = InOrder(
        model=model,
        args=args,
        train_dataset=data,
        optimizers=(model.optimizer(), None),
        callbacks=[ours, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return ours, trainer


def lightning(kind, directory, resume=None, callbacks=()):
    """Train; returns our callback and the trainer."""
    from lightning.pytorch import LightningModule, Trainer

    from poprisk_integrations.lightning import PopRiskEarlyStopping
    from poprisk_integrations.lightning.callbacks import PopRiskLRCut

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Model(kind)

        def training_step(self, batch, batch_idx):
            return self.net(*batch)["loss"]

        def configure_optimizers(self):
            return self.net.optimizer()

    ours = (PopRiskLRCut if kind == "cut" else PopRiskEarlyStopping)(**_options(kind))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(directory),
        max_epochs=_EPOCHS[kind],
        callbacks=[ours, *callbacks],
    )
    loader = DataLoader(TensorDataset(*_data(kind)), batch_size=8)
    trainer.fit(Module(), loader, ckpt_path=resume)
    return ours, trainer


def ending(framework, kind, ours, trainer):
    """What a run came to, in plain numbers."""
    step = trainer.state.global_step if framework == "huggingface" else trainer.global_step
    if kind == "cut" and framework == "huggingface":
        return {"step": step, "rule": ours.rule_state}
    if kind == "cut":
        return {"step": step, "rule": ours.state_dict()["rule"]}
    rule = ours.stopping_state if framework == "huggingface" else ours.state_dict()["rule"]
    return {"step": step, "rule": rule, "history": ours.history}


def _write(root):
    from lightning.pytorch.callbacks import ModelCheckpoint

    for kind in KINDS:
        out = root / f"huggingface_{kind}"
        ours, trainer = huggingface(kind, root / "run")
        checkpoint = f"checkpoint-{SAVED[kind]}"
        shutil.copytree(root / "run" / checkpoint, out / checkpoint)
        for name in ("training_args.bin", "rng_state.pth"):
            (out / checkpoint / name).unlink(missing_ok=True)
        text = json.dumps(ending("huggingface", kind, ours, trainer), indent=1)
        (out / "end.json").write_text(text + "\n")
        report = root / "run" / "poprisk_stop.json"
        if report.exists():
            shutil.copy(report, out)
        shutil.rmtree(root / "run")
        out = root / f"lightning_{kind}"
        saver = ModelCheckpoint(root / "run", "{step}", save_top_k=-1, save_on_train_epoch_end=True)
        ours, trainer = lightning(kind, root / "run", callbacks=[saver])
        out.mkdir()
        shutil.copy(root / "run" / f"step={SAVED[kind]}.ckpt", out / "middle.ckpt")
        text = json.dumps(ending("lightning", kind, ours, trainer), indent=1)
        (out / "end.json").write_text(text + "\n")
        report = root / "run" / "poprisk_stop.json"
        if report.exists():
            shutil.copy(report, out)
        shutil.rmtree(root / "run")


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
