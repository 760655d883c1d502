"""Toy modules, data and trainers for the Lightning tests."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskEarlyStopping

# Lightning's own advice about tiny runs, and its use of what newer torch deprecates.
third_party_warnings = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        ".*LeafSpec.* is deprecated",
    )
]

FLIPS = 0.3
STEPS_PER_EPOCH = 8


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def gated(params):
    return PopRiskAdamW(params, lr=1e-2)


def sgd(params):
    return torch.optim.SGD(params, lr=0.5)


class Classifier(LightningModule):
    """A small MLP; the optimizer comes from a function so that tests choose it."""

    def __init__(self, make_optimizer=None, width=32, dim=16, classes=4):
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, classes))
        self.make_optimizer = make_optimizer or adamw

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x).float(), y)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def noisy_data(n, flips=0.5, dim=16, classes=4, seed=0):
    """Examples of a linear teacher; `flips` is the share of labels drawn at random."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=g)
    teacher = torch.randn(dim, classes, generator=torch.Generator().manual_seed(99))
    y = (x @ teacher).argmax(-1)
    random = torch.randint(0, classes, (n,), generator=g)
    return TensorDataset(x, torch.where(torch.rand(n, generator=g) < flips, random, y))


def loader(n=256, batch_size=32, flips=FLIPS, shuffle=False, **kwargs):
    return DataLoader(noisy_data(n, flips), batch_size=batch_size, shuffle=shuffle, **kwargs)


def trainer(root, callbacks=(), **kwargs):
    """A silent trainer without checkpoints of its own; any argument may be overridden."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(root),
        "max_epochs": 10,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def fit(root, *callbacks, model=None, data=None, ckpt_path=None, **settings):
    """Ten epochs of 8 steps; returns the module and the trainer."""
    model, run = model or Classifier(), trainer(root, callbacks, **settings)
    run.fit(model, loader() if data is None else data, ckpt_path=ckpt_path)
    return model, run


def signal(**arguments):
    """A stop that acts at step 45 of the default fit, with its onset at step 32."""
    return PopRiskEarlyStopping(**{"criterion": "signal", "window": 8, **arguments})


def watch(**arguments):
    return signal(action="monitor", **arguments)


class SaveAt(Callback):
    """A checkpoint after one optimizer step, where ModelCheckpoint would save it."""

    def __init__(self, root, step):
        self.path, self.step = root / f"step{step}.ckpt", step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fp16(init_scale=1024.0, **kwargs):
    """Lightning turns "16-mixed" on CPU into bf16-mixed; a plugin keeps the scaler path."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **kwargs)
    return MixedPrecision("16-mixed", "cpu", scaler)


def assert_same(left, right):
    """Bitwise equality of nested state dictionaries."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left.isnan(), right.isnan())
        assert torch.equal(left[~left.isnan()], right[~right.isnan()])
    elif isinstance(left, dict):
        assert sorted(left, key=str) == sorted(right, key=str)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right
