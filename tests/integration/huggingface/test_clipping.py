"""Clipping by Trainer: undone where the norm before it is known, counted and told where not."""

import json

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import arguments, train


def _run(path, cls=Trainer, **changes):
    """A run whose weights stay as they are, so that clipping changes nothing but gradients."""
    options = {"optim": "sgd", "learning_rate": 0.0, "num_train_epochs": 4}
    callback = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8)
    trainer = train(arguments(path, **{**options, **changes}), callback, cls=cls)
    report = json.loads((path / "poprisk_stop.json").read_text())
    return trainer, report


class _ClipsItself(Trainer):
    """As transformers < 5.3: nobody is told the norm."""

    def _clip_grad_norm(self, model):
        return nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)


@pytest.mark.parametrize(("share", "warnings"), [(20 / 32, 1), (8 / 32, 0)])
def test_where_the_norm_is_not_known_it_is_counted_and_told_if_it_matters(
    tmp_path, caplog, share, warnings
):
    # All norms, as Trainer logs them where a limit is set; then a limit between two of them.
    trainer, _ = _run(tmp_path / "norms", max_grad_norm=1e9, logging_steps=1)
    norms = sorted(line["grad_norm"] for line in trainer.state.log_history if "loss" in line)
    assert len(norms) == 32
    below = round(32 * (1 - share))
    limit = float(norms[below - 1] + norms[below]) / 2
    caplog.clear()
    trainer, report = _run(tmp_path / "clipped", cls=_ClipsItself, max_grad_norm=limit)
    assert report["clipped_fraction"] == pytest.approx(share)
    assert trainer.state.log_history[-1]["poprisk/clipped_fraction"] == pytest.approx(share)
    assert "so F is of clipped gradients" in report["clipping"]
    assert caplog.text.count("were clipped to") == warnings


class _Freezes(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.embed.requires_grad_(False)


def test_steps_are_counted_across_a_change_of_the_trained_parameters(tmp_path):
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8)
    args = arguments(tmp_path, max_steps=12, max_grad_norm=1e-3)
    train(args, _Freezes(), stop, cls=_ClipsItself)
    assert stop.switched_off is None
    assert [row["step"] for row in stop.history] == [11]
    report = json.loads((tmp_path / "poprisk_stop.json").read_text())
    assert report["clipped_fraction"] == 1.0


class _TokenModel(nn.Module):
    """The mean over tokens of w x, its gradient the mean of x: noise around a mean of 0.

    Accepts `num_items_in_batch`, as models of transformers do.
    """

    accepts_loss_kwargs = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(40))
        self.counts = []

    def forward(self, x, labels=None, num_items_in_batch=None):
        assert num_items_in_batch is not None
        self.counts.append(int(num_items_in_batch))
        tokens = (labels != -100).float()
        loss = ((x @ self.weight) * tokens).sum() / num_items_in_batch
        return {"loss": loss, "logits": x}


def test_uneven_batches_leave_f_unbiased(tmp_path):
    """Rows of 1 to 6 tokens: gradients of one mean and of many variances."""
    torch.manual_seed(0)
    data = []
    for row in range(7 * 4 * 40):
        tokens = 1 + row % 6
        labels = torch.tensor([1] * tokens + [-100] * (6 - tokens))
        data.append({"x": torch.randn(6, 40), "labels": labels})
    model = _TokenModel()
    stop = hf.PopRiskEarlyStoppingCallback(
        criterion="signal", window=8, action="monitor", epoch_steps=10**6
    )
    args = arguments(
        tmp_path,
        optim="sgd",
        learning_rate=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        logging_steps=1000,
    )
    train(args, stop, model=model, train_dataset=data)
    ratios = torch.tensor([row["signal_ratio"] for row in stop.history])
    assert len(set(model.counts)) > 10
    assert len(ratios) == 17
    # 40 coordinates and 17 windows: a mean has a spread of about sqrt(2 / (40 * 17)).
    assert ratios.mean().item() == pytest.approx(1.0, abs=4 * (2 / (40 * 17)) ** 0.5)
