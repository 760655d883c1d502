"""NaN and Inf in random batches: steps without a trace, states finite, windows that say so."""

import random
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import poprisk_integrations.huggingface as hf
from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.helpers.tiny_trainer import arguments, dataset, train
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings
STEPS = 64


def _bad_steps(share: float = 0.2) -> set[int]:
    return {step for step in range(STEPS) if random.Random(step).random() < share}


def _bad_value(step: int) -> float:
    return (float("nan"), float("inf"), -float("inf"))[step % 3]


def _require_finite(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    tensors = [*model.parameters()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 8
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_under_trainer(tmp_path: Path) -> None:
    rows = dataset(8 * STEPS)
    order = {}

    class Model(torch.nn.Module):
        """Poisons the batch of a step, whatever its examples are."""

        def __init__(self) -> None:
            super().__init__()
            from tests.helpers.tiny_trainer import TinyModel

            self.inner, self.calls = TinyModel(), 0

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            if self.calls in bad:
                labels = labels * _bad_value(self.calls)
                order[self.calls] = True
            self.calls += 1
            return self.inner(x, labels)

    bad = _bad_steps()
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8, action="monitor")
    args = arguments(tmp_path, max_steps=STEPS, max_grad_norm=0.0, logging_nan_inf_filter=False)
    trainer = train(args, stop, model=Model(), train_dataset=rows)
    assert 8 < len(bad) == len(order)
    assert trainer.optimizer.optimizer.skipped_nonfinite == len(bad)
    _require_finite(trainer.optimizer, trainer.model)
    for row in stop.history:
        end = row["step"]
        assert row["steps"] == 8 - len(bad & set(range(end - 8, end)))
        assert row["signal_ratio"] == row["signal_ratio"]
    assert len(stop.history) > 4


def test_under_lightning(tmp_path: Path) -> None:
    bad = _bad_steps()
    x, y = toy.noisy_data(8 * STEPS).tensors
    for step in bad:
        x[8 * step] = _bad_value(step)
    stop = PopRiskEarlyStopping(criterion="signal", window=8, action="monitor")
    model = toy.Classifier(toy.gated)
    trainer = toy.trainer(tmp_path, [stop], max_epochs=1)
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=8))
    assert trainer.global_step == STEPS
    assert trainer.optimizers[0].skipped_nonfinite == len(bad) > 8
    _require_finite(trainer.optimizers[0], model)
    assert len(stop.history) > 4
    assert all(record["signal_ratio"] is not None for record in stop.history)


def test_under_a_grad_scaler() -> None:
    """Without a trace: the same as a run that never saw the bad batches."""
    bad = _bad_steps()

    def run(batches: list[int]) -> tuple[torch.nn.Module, PopRiskAdamW, GradientWindow]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = PopRiskAdamW(model.parameters(), lr=1e-2)
        # A growth interval beyond the run, and no backoff: scales of powers of two are exact.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
        window = GradientWindow(STEPS)
        for step in batches:
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            if step in bad:
                x[0] = _bad_value(step)
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            window.add(list(model.parameters()))
            scaler.step(optimizer)
            scaler.update()
        return model, optimizer, window

    hit, optimizer, window = run(list(range(STEPS)))
    spared, other, clean = run([step for step in range(STEPS) if step not in bad])
    _require_finite(optimizer, hit)
    for one, two in zip(hit.parameters(), spared.parameters(), strict=True):
        assert torch.equal(one, two)
        assert optimizer.state[one]["step"] == other.state[two]["step"] == STEPS - len(bad)
    measured, expected = window.close(), clean.close()
    assert measured is not None
    assert expected is not None
    assert measured.steps == expected.steps == STEPS - len(bad)
    assert measured.ratio == pytest.approx(expected.ratio, rel=1e-6)
