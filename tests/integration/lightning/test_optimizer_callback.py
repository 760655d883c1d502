"""PopRiskOptimizer and PopRiskMonitor in real fits."""

import csv
import logging
import math
import os
from unittest import mock

import pytest
import torch
from lightning.pytorch import loggers
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler as lrs

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.cli.report.run import parse_key
from poprisk_integrations.diagnostics.layer_sample import LAYER_STATISTICS
from poprisk_integrations.lightning import PopRiskMonitor, PopRiskOptimizer
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


def scheduled(interval, make_scheduler, make_optimizer=toy.adamw):
    class Scheduled(toy.Classifier):
        def configure_optimizers(self):
            optimizer = make_optimizer(self.parameters())
            config = {"scheduler": make_scheduler(optimizer), "interval": interval}
            if isinstance(config["scheduler"], lrs.ReduceLROnPlateau):
                config["monitor"] = "train_loss"
            return {"optimizer": optimizer, "lr_scheduler": config}

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    return Scheduled()


def fit(root, model, *callbacks, **settings):
    return toy.fit(root, *callbacks, model=model, **{"max_epochs": 4, **settings})


SCHEDULES = {
    "none": None,
    "plateau": ("epoch", lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=0)),
    "sequential": (
        "step",
        lambda o: lrs.SequentialLR(
            o, [lrs.LinearLR(o, 0.1, 1.0, 8), lrs.CosineAnnealingLR(o, 24)], [8]
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_returning_popriskadamw_from_the_module(tmp_path, name):
    def module(make_optimizer):
        if SCHEDULES[name] is None:
            return toy.Classifier(make_optimizer)
        return scheduled(*SCHEDULES[name], make_optimizer)

    replaced, with_callback = fit(tmp_path, module(toy.adamw), PopRiskOptimizer())
    returned, by_module = fit(tmp_path, module(toy.gated))
    ours = with_callback.optimizers[0]
    assert type(ours) is PopRiskAdamW
    toy.assert_same(replaced.state_dict(), returned.state_dict())
    toy.assert_same(
        [float(g["lr"]) for g in ours.param_groups],
        [float(g["lr"]) for g in by_module.optimizers[0].param_groups],
    )
    plain, _ = fit(tmp_path, module(toy.adamw))
    assert not torch.equal(plain.net[0].weight, replaced.net[0].weight)


def test_gate_none_equals_the_modules_adamw_bitwise(tmp_path):
    def adamw(params):
        return torch.optim.AdamW(params, lr=1e-2, foreach=False)

    replaced, _ = fit(tmp_path, toy.Classifier(adamw), PopRiskOptimizer(gate="none"))
    plain, _ = fit(tmp_path, toy.Classifier(adamw))
    toy.assert_same(replaced.state_dict(), plain.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_keeps_float32_states(tmp_path, precision):
    _, trainer = fit(tmp_path, toy.Classifier(), PopRiskOptimizer(), precision=precision)
    states = trainer.optimizers[0].state.values()
    assert {s["exp_avg_sq"].dtype for s in states} == {torch.float32}


def test_says_what_it_did(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, toy.Classifier(), PopRiskOptimizer(gate="hard"), max_epochs=1)
    (line,) = [r.message for r in caplog.records if "PopRiskOptimizer" in r.message]
    assert "gate='hard'" in line
    assert "replaces AdamW" in line


def test_refuses_other_optimizers_before_any_step(tmp_path):
    model = toy.Classifier(toy.sgd)
    with pytest.raises(MisconfigurationException, match="cannot replace SGD"):
        fit(tmp_path, model, PopRiskOptimizer())
    toy.assert_same(model.state_dict(), toy.Classifier().state_dict())


def test_refuses_deepspeed_which_would_go_on_with_the_old_optimizer(tmp_path):
    """It needs accelerators; the check needs the class only."""
    trainer = toy.trainer(tmp_path)
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    object.__setattr__(trainer._accelerator_connector, "strategy", strategy)
    old = torch.optim.AdamW(toy.Classifier().parameters())
    strategy._optimizers = [old]  # at stage 0 it is the module's own
    with pytest.raises(MisconfigurationException, match="Return PopRiskAdamW from configure_opt"):
        PopRiskOptimizer().on_fit_start(trainer, toy.Classifier())
    assert strategy._optimizers == [old]


def test_works_with_finetuning_that_adds_groups(tmp_path):
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    def trained(params):
        return torch.optim.AdamW([p for p in params if p.requires_grad], lr=1e-2)

    callbacks = [PopRiskOptimizer(gate="hard"), Unfreeze(), toy.signal()]
    model, trainer = fit(tmp_path, toy.Classifier(trained), *callbacks)
    assert [g["gate"] for g in trainer.optimizers[0].param_groups] == ["hard", "hard"]
    assert not torch.equal(model.net[0].weight, toy.Classifier().net[0].weight)


def test_manual_optimization_with_several_adams(tmp_path):
    class TwoAdams(toy.Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.AdamW(layer.parameters(), lr=1e-2) for layer in self.net[::2]]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    _, trainer = fit(tmp_path, TwoAdams(), PopRiskOptimizer(), max_epochs=1)
    assert [type(o) for o in trainer.optimizers] == [PopRiskAdamW, PopRiskAdamW]
    assert all(float(s["step"]) == 8 for o in trainer.optimizers for s in o.state.values())


def test_the_stop_and_the_monitor_see_the_replaced_optimizer(tmp_path):
    """In any order of callbacks."""
    stop = toy.signal()
    callbacks = [PopRiskMonitor(every_n_steps=1), stop, PopRiskOptimizer()]
    _, trainer = fit(tmp_path, toy.Classifier(), *callbacks, max_epochs=20)
    assert trainer.global_step == stop.stopped_step > stop.onset_step > 0
    assert 0 < float(trainer.callback_metrics["poprisk/open_fraction"]) < 1


# The monitor; its numbers by layer, and that it changes nothing: `test_stop_contract.py`.

STATS = (
    *("open_fraction", "mean_gate", "update_norm_ratio", "closed_zero_grad", "closed_noise"),
    *("skipped_nonfinite", "effective_lr"),
)


def test_every_statistic_is_the_optimizers_and_logged_at_its_interval(tmp_path, monkeypatch):
    seen, reads = [], []
    gate_sums = PopRiskAdamW.gate_sums
    monkeypatch.setattr(
        PopRiskAdamW, "gate_sums", lambda *args: reads.append(1) or gate_sums(*args)
    )

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            metrics = trainer.callback_metrics
            seen.append(tuple(float(metrics[f"poprisk/{name}"]) for name in STATS))

    model = toy.Classifier(toy.gated)
    _, trainer = fit(tmp_path, model, PopRiskMonitor(4), Watch(), max_epochs=2, max_steps=13)
    changes = [step for step in range(2, 14) if seen[step - 1] != seen[step - 2]]
    assert changes == [5, 9, 13]  # sampled at steps 1, 5, 9, 13
    assert len(reads) == 4  # of the device
    assert seen[0][0] == 1.0  # all open at the first step
    stats = trainer.optimizers[0].gate_stats()
    assert seen[-1] == pytest.approx([float(stats[name]) for name in STATS])


def test_refuses_other_optimizers(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"PopRiskMonitor .* found: AdamW"):
        fit(tmp_path, toy.Classifier(), PopRiskMonitor())


def test_predicted_decrease_is_of_unclipped_unscaled_gradients(tmp_path):
    """lr=1e-9: the weights of all runs are the same."""

    def nearly_still(params):
        return PopRiskAdamW(params, lr=1e-9, weight_decay=0.0)

    values = []
    for settings in ({}, {"gradient_clip_val": 1e-3}, {"plugins": [toy.fp16()]}):
        settings |= {"max_epochs": 1}
        _, trainer = fit(tmp_path, toy.Classifier(nearly_still), PopRiskMonitor(1), **settings)
        values.append(float(trainer.callback_metrics["poprisk/predicted_decrease"]))
    # Adam's direction does not know the scale of the gradient, the product does.
    assert values[1:] == pytest.approx([values[0]] * 2, rel=0.5)
    assert values[0] > 0


LAYERS = ("net.0", "net.2")
LOGGED = {f"poprisk/{name}" for name in (*LAYER_STATISTICS, "signal_to_noise")}
LOGGED |= {f"poprisk/{layer}/{key[8:]}" for layer in LAYERS for key in LOGGED}
LOGGED |= {"poprisk/predicted_decrease"}


def from_csv(root):
    logger = loggers.CSVLogger(root)
    yield logger
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    yield {key for key in rows[-1] if key in LOGGED and math.isfinite(float(rows[-1][key]))}


def from_tensorboard(root):
    logger = loggers.TensorBoardLogger(root)
    yield logger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    yield set(events.Tags()["scalars"])


def from_wandb(root):
    logger = loggers.WandbLogger(save_dir=root, offline=True)
    yield logger
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    yield set(summary)


def from_mlflow(root):
    logger = loggers.MLFlowLogger(tracking_uri=(root / "mlruns").as_uri())
    yield logger
    yield set(logger.experiment.get_run(logger.run_id).data.metrics)


@pytest.mark.parametrize(
    ("module", "of"),
    [
        ("csv", from_csv),
        ("tensorboard", from_tensorboard),
        ("wandb", from_wandb),
        ("mlflow", from_mlflow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_totals_and_layers_reach_every_logger_that_is_installed(tmp_path, module, of):
    pytest.importorskip(module, reason=f"{module} is not installed (no extra needs it)")
    with mock.patch.dict(os.environ, MLFLOW_ALLOW_FILE_STORE="true"):  # trackers set more
        steps = of(tmp_path)
        settings = {"logger": next(steps), "max_epochs": 2, "log_every_n_steps": 4}
        fit(tmp_path, toy.Classifier(toy.gated), PopRiskMonitor(2, per_layer=True), **settings)
        assert next(steps) >= LOGGED
    assert {parse_key(key).group for key in LOGGED} == {"", *LAYERS}  # as a report reads them
