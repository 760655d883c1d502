"""Lightning under either of its import names: optimizer, stop, monitor, a resumed run."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning" if find_spec("lightning") else "pytorch_lightning")

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskEarlyStopping, PopRiskMonitor, PopRiskOptimizer
from poprisk_integrations.lightning._upstream import LightningModule, Trainer

EPOCHS = 40


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]


def _data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    clean = (x @ torch.randn(16, 4, generator=generator)).argmax(-1)
    noise = torch.randint(0, 4, (256,), generator=generator)
    flipped = torch.rand(256, generator=generator) < 0.5
    return DataLoader(TensorDataset(x, torch.where(flipped, noise, clean)), batch_size=32)


def _fit(root: Path, *callbacks: Any, epochs: int = EPOCHS, resume: str | None = None) -> Any:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(root),
        max_epochs=epochs,
        callbacks=list(callbacks),
    )
    trainer.fit(Classifier(), _data(), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("gated", [False, True])
def test_stops_with_either_optimizer(tmp_path: Path, gated: bool) -> None:
    stop = PopRiskEarlyStopping(criterion="signal", window=8)
    extra = [PopRiskOptimizer(false_open_rate=0.05), PopRiskMonitor(every_n_steps=4)]
    trainer = _fit(tmp_path, stop, *(extra if gated else []))
    assert isinstance(trainer.optimizers[0], PopRiskAdamW) == gated
    assert trainer.global_step < 8 * EPOCHS
    assert f"step {trainer.global_step}" in stop.stopping_reason


def test_resumed_run_is_the_whole_run(tmp_path: Path) -> None:
    options = {"kappa": 3.0, "window": 12}
    stops = [PopRiskEarlyStopping(criterion="signal", **options) for _ in range(3)]
    whole = _fit(tmp_path, stops[0], PopRiskOptimizer())
    part = _fit(tmp_path, stops[1], PopRiskOptimizer(), epochs=2)  # in the midst of a window
    part.save_checkpoint(tmp_path / "part.ckpt")
    resumed = _fit(tmp_path, stops[2], PopRiskOptimizer(), resume=str(tmp_path / "part.ckpt"))
    assert resumed.global_step == whole.global_step < 8 * EPOCHS
    assert stops[2].stopping_reason == stops[0].stopping_reason
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_import_name() -> None:
    expected = "lightning." if find_spec("lightning") else "pytorch_lightning."
    assert Trainer.__module__.startswith(expected)
