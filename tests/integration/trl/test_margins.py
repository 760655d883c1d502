"""The margins that are logged are those of the pairs; without them training goes on."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from tests.helpers.tiny_dpo import dpo_trainer, pairs, sequence_log_probs, tiny_model

BETA = 0.25


def build(tmp_path: Path, **options: Any) -> Any:
    return dpo_trainer(tmp_path, None, pairs(8, seed=1), **{"stop": False, "beta": BETA, **options})


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_evaluation_logs_the_margins_of_the_trained_model(tmp_path: Path, peft: bool) -> None:
    options: dict[str, Any] = {"per_device_eval_batch_size": 3}
    if peft:
        lora = LoraConfig(r=4, target_modules=["v_proj", "o_proj"])
        options |= {"peft_config": lora, "ref_model": None, "learning_rate": 0.05}
    trainer = build(tmp_path, **options)
    trainer.train()
    metrics = trainer.evaluate()
    parts = []
    trainer.model.eval()
    with torch.no_grad():
        for inputs in trainer.get_eval_dataloader():
            policy = sequence_log_probs(trainer.model, inputs)
            reference = sequence_log_probs(tiny_model().eval(), inputs)
            parts.append((policy - reference).numpy().reshape(2, -1).T)
    ratios = np.concatenate(parts)
    assert len(ratios) == 8
    margins = BETA * (ratios[:, 0] - ratios[:, 1])
    logged = trainer.state.log_history[-1]
    found = [logged[f"eval_poprisk/{name}"] for name in ("kl_data", "margin_p10", "margin_p50")]
    expected = [ratios.mean(), np.quantile(margins, 0.1), np.median(margins)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert np.ptp(margins) > 1e-3  # quantiles that differ, of a model that has moved
    assert metrics["eval_loss"] == logged["eval_loss"]


def test_quantiles_are_over_all_pairs_since_the_last_log(tmp_path: Path) -> None:
    # One pair per micro-batch: a mean over micro-batches would make both quantiles the mean.
    trainer = build(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, logging_steps=2
    )
    trainer.train()
    line = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert line["poprisk/margin_p10"] < line["poprisk/margin_p50"] - 1e-3
    rewards = (line["rewards/chosen"] + line["rewards/rejected"]) / 2
    assert line["poprisk/kl_data"] == pytest.approx(rewards / BETA, abs=1e-5)
    assert len(trainer.take_log_ratios("train")[0]) == 0  # nothing is left
    for model in (trainer.model, trainer.ref_model):
        assert not model._forward_hooks
        assert not model._forward_pre_hooks


def test_where_margins_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(tmp_path)
    strict = build(tmp_path, noise="rdpo", noise_rate=0.3)
    module = "poprisk_integrations.trl.poprisk_dpo_trainer.ForwardRecorder.__enter__"
    blind = SimpleNamespace(policy_output=None, reference_output=None)
    monkeypatch.setattr(module, lambda self: blind)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 6
    assert not any("poprisk/kl_data" in line for line in trainer.state.log_history)
    assert sum("Per-pair margins" in record.message for record in caplog.records) == 1
    with pytest.raises(ValueError, match=r"Invalid noise: 'rdpo'. Per-pair margins are not"):
        strict.train()


def test_trackers_get_our_numbers(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Tracker:
        """Stands where Trainer puts trackers: before any callback of the user."""

        def __getattr__(self, name: str) -> Any:
            return lambda args, state, control, **kwargs: None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            seen.append(dict(logs))

    stop = PopRiskEarlyStoppingCallback(criterion="signal", window=4, kappa=1.0)
    trainer = build(tmp_path, callbacks=[stop])
    trainer.callback_handler.callbacks.insert(0, Tracker())
    trainer.train()
    assert "poprisk/signal_ratio" in seen[-1]
    assert "poprisk/open_fraction" in seen[-1]
    assert "poprisk/margin_p50" in seen[-2]
