"""Canaries: the private names of Lightning and torch that `_upstream` relies on still exist."""

import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from poprisk_integrations.lightning import _upstream

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*barebones"),
]


def test_can_stop_early_exists():
    assert isinstance(_FitLoop._can_stop_early, property)


def test_the_loaders_that_are_drawn_from_are_kept():
    found = []

    class Looks(BoringModel):
        def on_train_start(self):
            found.extend(_upstream.training_loaders(self.trainer))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    trainer = Trainer(max_steps=1, accelerator="cpu", devices=1, barebones=True)
    data = DataLoader(RandomDataset(32, 8), shuffle=True)
    trainer.fit(Looks(), CombinedLoader([data, data]))
    assert [type(one.sampler).__name__ for one in found] == ["RandomSampler"] * 2
    assert _upstream.training_loaders(Trainer(max_steps=1, accelerator="cpu", barebones=True)) == []


def test_fused_optimizers_say_that_they_unscale():
    param = torch.nn.Parameter(torch.zeros(1))
    assert torch.optim.AdamW([param], fused=True)._step_supports_amp_scaling
    assert not getattr(torch.optim.AdamW([param]), "_step_supports_amp_scaling", False)


RUN = """
import sys
from importlib.machinery import PathFinder
from importlib import util

class Hide:
    # As if these packages were not installed.
    names = {hidden!r}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hide())
real = util.find_spec
util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in Hide.names else real(name, package)
)
{body}
"""

FIT = """
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel
from poprisk_integrations.lightning import PopRiskEarlyStopping, PopRiskMonitor, PopRiskOptimizer

class Model(BoringModel):
    val_dataloader = None
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

assert any(c.__module__.startswith("pytorch_lightning") for c in PopRiskMonitor.__mro__)
stop = PopRiskEarlyStopping(criterion="signal", window=4)
Trainer(
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    max_steps=10, callbacks=[PopRiskOptimizer(), PopRiskMonitor(1), stop],
).fit(Model())
assert stop.metrics()["poprisk/signal_ratio"] >= 0
assert not any(name == "lightning" or name.startswith("lightning.") for name in sys.modules)
print("fitted")
"""


def run_without(body, *hidden):
    code = RUN.format(hidden=set(hidden), body=body)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=240
    )


def test_pytorch_lightning_is_used_where_only_that_is_installed(tmp_path):
    pytest.importorskip("pytorch_lightning")
    result = run_without(FIT, "lightning")
    assert "fitted" in result.stdout, result.stderr


def test_without_either_the_error_is_the_line_to_run():
    result = run_without("import poprisk_integrations.lightning", "lightning", "pytorch_lightning")
    assert result.returncode != 0
    assert "pip install 'poprisk_integrations[lightning]'" in result.stderr.splitlines()[-1]
