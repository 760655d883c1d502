"""The loss of each noise mode inside a real run, against float64 and against TRL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from tests.helpers.tiny_dpo import (
    dpo_trainer,
    losses_of,
    pairs,
    sequence_log_probs,
    tiny_model,
    weights_of,
)
from tests.reference import preferences as twin

BETA = 2.0  # large, so that the losses differ
TRL = {"kind": DPOTrainer, "config": DPOConfig}


def build(tmp_path: Path, data: Dataset | None = None, **options: Any) -> Any:
    """The reference is another model: margins that are not zero."""
    settings: dict[str, Any] = {"beta": BETA, "optim": "adamw_torch", "ref_model": 1}
    if "kind" not in options:
        settings["stop"] = False
    return dpo_trainer(tmp_path, data, **{**settings, **options})


def batch_and_margins(trainer: Any) -> tuple[dict[str, Any], torch.Tensor]:
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        reference = sequence_log_probs(trainer.ref_model, inputs)
    chosen, rejected = (sequence_log_probs(trainer.model, inputs) - reference).chunk(2)
    return inputs, BETA * (chosen - rejected)


def p_correct(h: Any) -> Any:
    """Before there is an estimate, the posterior of a pair comes from its present margin."""
    return 1 - twin.flip_posterior(h, 0.3, 1)


# Mode -> options, loss, and the force where it is not the slope: the posterior is a constant.
MODES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "cdpo": ({"noise_rate": 0.3}, lambda h: twin.cdpo(h, 0.3), None),
    "rdpo": ({"noise_rate": 0.3}, lambda h: twin.bounded_rdpo(h, 0.3, 4.0), None),
    "holder": ({}, lambda h: twin.holder(h, 2.0), None),
    "weights": (
        {"noise_rate": 0.3},
        lambda h: twin.posterior(h, p_correct(h)),
        lambda h: p_correct(h) - twin.s(h),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_loss_of_a_batch(tmp_path: Path, mode: str) -> None:
    options, loss, force = MODES[mode]
    trainer = build(tmp_path, noise=mode, **options)
    inputs, margins = batch_and_margins(trainer)
    h = margins.detach().numpy()
    assert np.ptp(h) > 0.5
    found = trainer.compute_loss(trainer.model, dict(inputs))
    assert found.item() == pytest.approx(loss(h).mean(), abs=1e-5)
    assert abs(loss(h).mean() - twin.dpo(h).mean()) > 1e-2
    # Its gradient is the force on each pair times the gradient of the pair's margin.
    found.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    forces = twin.slope(loss, h) if force is None else force(h)
    (-(torch.as_tensor(forces) * margins).mean()).backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-3)
    trainer.model.eval()  # evaluations keep TRL's loss
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, inputs)
    assert found.item() == pytest.approx(twin.dpo(h).mean(), abs=1e-5)


@pytest.mark.parametrize("order", [["sigmoid", "sft"], ["sft", "sigmoid"]])
def test_other_terms_of_the_loss_stay(tmp_path: Path, order: list[str]) -> None:
    options = {"loss_type": order, "loss_weights": [{"sigmoid": 0.7, "sft": 0.2}[o] for o in order]}
    losses = {}
    for mode, rate in (("off", None), ("rdpo", 0.3)):
        trainer = build(tmp_path, noise=mode, noise_rate=rate, **options)
        inputs, margins = batch_and_margins(trainer)
        losses[mode] = trainer.compute_loss(trainer.model, inputs).item()
    h = margins.detach().numpy()
    expected = 0.7 * (twin.bounded_rdpo(h, 0.3, 4.0) - twin.dpo(h)).mean()
    assert losses["rdpo"] - losses["off"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", ["weights", "rdpo"])
def test_weights_of_a_column(tmp_path: Path, mode: str) -> None:
    weights = [0.25 * (row % 5) for row in range(16)]
    data = pairs(16).add_column("confidence", weights)
    rate = 0.3 if mode == "rdpo" else None
    trainer = build(tmp_path, data, noise=mode, noise_rate=rate, pair_weight_column="confidence")
    inputs, margins = batch_and_margins(trainer)
    h = margins.detach().numpy()
    rows = inputs["poprisk_row"].tolist()
    loss = twin.dpo(h) if mode == "weights" else twin.bounded_rdpo(h, 0.3, 4.0)
    found = trainer.compute_loss(trainer.model, inputs)
    expected = np.mean([weights[row] * value for row, value in zip(rows, loss, strict=True)])
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert len({weights[row] for row in rows}) > 1


@pytest.mark.parametrize(
    ("mode", "steps"),
    # Half an epoch of 64 pairs before there is an estimate; "auto" keeps the loss for good.
    [("cdpo", 8), ("rdpo", 8), ("weights", 8), ("auto", 40)],
)
def test_training_is_that_of_trl_without_a_rate(tmp_path: Path, mode: str, steps: int) -> None:
    theirs = build(tmp_path, pairs(64), max_steps=steps, **TRL)
    mine = build(tmp_path, pairs(64), noise=mode, max_steps=steps)
    for trainer in (theirs, mine):
        trainer.train()
    assert torch.equal(weights_of(mine), weights_of(theirs))
    logged = any("poprisk/noise_rate" in line for line in mine.state.log_history)
    assert logged == (mode == "auto")


def test_robust_with_a_known_rate_is_trl_s_robust_up_to_its_limit(tmp_path: Path) -> None:
    options = {"max_steps": 6, "optim": "sgd", "learning_rate": 0.01}
    theirs = build(tmp_path, loss_type="robust", label_smoothing=0.3, **TRL, **options)
    mine = build(tmp_path, noise="rdpo", noise_rate=0.3, rdpo_max_margin=1e6, **options)
    for trainer in (theirs, mine):
        trainer.train()
    assert (weights_of(mine) - weights_of(theirs)).abs().max() < 1e-6
    start = torch.cat([p.flatten() for p in tiny_model().parameters()])
    assert (weights_of(mine) - start).abs().max() > 1e-3


WAYS: dict[str, dict[str, Any]] = {
    "lora": {"peft": True},
    "lora, precomputed": {"peft": True, "precompute_ref_log_probs": True},
    "precomputed, accumulation": {
        "precompute_ref_log_probs": True,
        "gradient_accumulation_steps": 2,
    },
    "checkpointing, bf16": {"gradient_checkpointing": True, "bf16": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(tmp_path: Path, way: str) -> None:
    options = dict(WAYS[way])
    if options.pop("peft", False):
        options["peft_config"] = LoraConfig(r=4, target_modules=["v_proj", "o_proj"])
        options["ref_model"] = None
    found = {}
    for mode, rate in (("off", None), ("cdpo", 0.4)):
        trainer = build(tmp_path, noise=mode, noise_rate=rate, learning_rate=0.01, **options)
        trainer.train()
        found[mode] = losses_of(trainer)
    assert found["off"] != found["cdpo"]
    assert all(np.isfinite(found["cdpo"]))
    # -0.6 log s(h) - 0.4 log s(-h) is at least the entropy of the label.
    floor = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    slack = 0.01 if "bf16" in options else 1e-6
    assert min(found["cdpo"]) > floor - slack


@pytest.mark.parametrize("mode", ["off", "auto", "weights"])
def test_streamed_data(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    rate = 0.3 if mode == "weights" else None
    stream = pairs(16).to_iterable_dataset()
    trainer = build(tmp_path, stream, noise=mode, noise_rate=rate, max_steps=6)
    trainer.train()
    assert np.isfinite(losses_of(trainer)).all()
    assert len(losses_of(trainer)) == 6
    with pytest.raises(ValueError, match="map-style"):
        trainer.flip_report()
    said = "train_dataset is streamed: the noise rate is not estimated, and there is no flip report"
    assert (said in caplog.text) == (mode == "auto")
