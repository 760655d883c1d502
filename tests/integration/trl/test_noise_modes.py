"""The loss of each noise mode inside a real run, against float64 and against TRL."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from tests.helpers.tiny_dpo import config_options, pairs, tiny_model, tiny_tokenizer
from tests.reference import preferences as twin

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

BETA = 2.0  # large, so that the losses differ


def build(
    tmp_path: Path, data: Dataset | None = None, *, peft: bool = False, **options: Any
) -> PopRiskDPOTrainer:
    settings = {"stop": False, "beta": BETA, "optim": "adamw_torch", **options}
    return PopRiskDPOTrainer(
        tiny_model(),
        ref_model=None if peft else tiny_model(1),  # another one: margins that are not zero
        args=PopRiskDPOConfig(**config_options(tmp_path, **settings)),
        train_dataset=pairs(16) if data is None else data,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["v_proj", "o_proj"]) if peft else None,
    )


def log_probs(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    found = logits.double().log_softmax(-1)[:, :-1]
    tokens = found.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * inputs["completion_mask"][:, 1:]).sum(1)


def batch_and_margins(trainer: PopRiskDPOTrainer) -> tuple[dict[str, Any], torch.Tensor]:
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        reference = log_probs(trainer.ref_model, inputs)
    chosen, rejected = (log_probs(trainer.model, inputs) - reference).chunk(2)
    return inputs, BETA * (chosen - rejected)


MODES = {
    "cdpo": ({"noise_rate": 0.3}, lambda h: twin.cdpo(h, 0.3)),
    "rdpo": ({"noise_rate": 0.3}, lambda h: twin.bounded_rdpo(h, 0.3, 4.0)),
    "holder": ({}, lambda h: twin.holder(h, 2.0)),
    # Before there is an estimate, the posterior of a pair comes from its present margin.
    "weights": (
        {"noise_rate": 0.3},
        lambda h: twin.posterior(h, 1 - twin.flip_posterior(h, 0.3, 1)),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_loss_of_a_batch(tmp_path: Path, mode: str) -> None:
    options, loss = MODES[mode]
    trainer = build(tmp_path, noise=mode, **options)
    inputs, margins = batch_and_margins(trainer)
    h = margins.detach().numpy()
    assert np.ptp(h) > 0.5
    found = trainer.compute_loss(trainer.model, dict(inputs))
    assert found.item() == pytest.approx(loss(h).mean(), abs=1e-5)
    assert abs(loss(h).mean() - twin.dpo(h).mean()) > 1e-2
    # Its gradient is the force on each pair times the gradient of the pair's margin. The posterior
    # is a constant in it.
    found.backward()
    if mode == "weights":
        force = 1 - twin.flip_posterior(h, 0.3, 1) - twin.s(h)
    else:
        force = twin.slope(loss, h)
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    (-(torch.as_tensor(force) * margins).mean()).backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("order", [["sigmoid", "sft"], ["sft", "sigmoid"]])
def test_other_terms_of_the_loss_stay(tmp_path: Path, order: list[str]) -> None:
    weights = [0.7, 0.2] if order[0] == "sigmoid" else [0.2, 0.7]
    losses = {}
    for mode in ("off", "rdpo"):
        options = {"noise_rate": 0.3} if mode == "rdpo" else {}
        trainer = build(tmp_path, noise=mode, loss_type=order, loss_weights=weights, **options)
        inputs, margins = batch_and_margins(trainer)
        losses[mode] = trainer.compute_loss(trainer.model, inputs).item()
    h = margins.detach().numpy()
    expected = 0.7 * (twin.bounded_rdpo(h, 0.3, 4.0) - twin.dpo(h)).mean()
    assert losses["rdpo"] - losses["off"] == pytest.approx(expected, abs=1e-5)


def test_evaluation_keeps_the_loss_of_trl(tmp_path: Path) -> None:
    trainer = build(tmp_path, noise="cdpo", noise_rate=0.3)
    inputs, margins = batch_and_margins(trainer)
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, inputs)
    assert found.item() == pytest.approx(twin.dpo(margins.detach().numpy()).mean(), abs=1e-5)


@pytest.mark.parametrize("mode", ["weights", "rdpo"])
def test_weights_of_a_column(tmp_path: Path, mode: str) -> None:
    weights = [0.25 * (row % 5) for row in range(16)]
    data = pairs(16).add_column("confidence", weights)
    options = {"noise_rate": 0.3} if mode == "rdpo" else {}
    trainer = build(tmp_path, data, noise=mode, pair_weight_column="confidence", **options)
    inputs, margins = batch_and_margins(trainer)
    h = margins.detach().numpy()
    rows = inputs["poprisk_row"].tolist()
    loss = twin.dpo(h) if mode == "weights" else twin.bounded_rdpo(h, 0.3, 4.0)
    found = trainer.compute_loss(trainer.model, inputs)
    expected = np.mean([weights[row] * value for row, value in zip(rows, loss, strict=True)])
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert len({weights[row] for row in rows}) > 1


def weights_of(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def train_with_trl(tmp_path: Path, count: int, **options: Any) -> DPOTrainer:
    """TRL's own trainer, from the same start on the same data as `build`."""
    trainer = DPOTrainer(
        tiny_model(),
        ref_model=tiny_model(1),
        args=DPOConfig(**config_options(tmp_path, **options)),
        train_dataset=pairs(count),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("mode", ["cdpo", "rdpo", "weights"])
def test_until_there_is_an_estimate_training_is_that_of_trl(tmp_path: Path, mode: str) -> None:
    options = {"max_steps": 8, "beta": BETA, "optim": "adamw_torch"}  # half an epoch of 64 pairs
    theirs = train_with_trl(tmp_path, 64, **options)
    mine = build(tmp_path, pairs(64), noise=mode, max_steps=8)
    mine.train()
    assert torch.equal(weights_of(mine), weights_of(theirs))


def test_auto_estimates_and_keeps_the_loss_of_trl(tmp_path: Path) -> None:
    options = {"max_steps": 40, "beta": BETA, "optim": "adamw_torch"}  # 2.5 epochs
    theirs = train_with_trl(tmp_path, 64, **options)
    mine = build(tmp_path, pairs(64), noise="auto", max_steps=40)
    mine.train()
    assert torch.equal(weights_of(mine), weights_of(theirs))
    assert mine._noise.estimate is not None


def test_robust_with_a_known_rate_is_trl_s_robust_up_to_its_limit(tmp_path: Path) -> None:
    options = {"max_steps": 6, "beta": BETA, "optim": "sgd", "learning_rate": 0.01}
    theirs = train_with_trl(tmp_path, 16, loss_type="robust", label_smoothing=0.3, **options)
    mine = build(tmp_path, noise="rdpo", noise_rate=0.3, rdpo_max_margin=1e6, **options)
    mine.train()
    assert (weights_of(mine) - weights_of(theirs)).abs().max() < 1e-6
    start = torch.cat([p.flatten() for p in tiny_model().parameters()])
    assert (weights_of(mine) - start).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"peft": True},
        {"peft": True, "precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "bf16": True},
    ],
    ids=["lora", "lora, precomputed", "precomputed, accumulation", "checkpointing, bf16"],
)
def test_ways_to_train(tmp_path: Path, options: dict[str, Any]) -> None:
    found = {}
    for mode in ("off", "cdpo"):
        rate = {"noise_rate": 0.4} if mode == "cdpo" else {}
        trainer = build(tmp_path, noise=mode, learning_rate=0.01, **rate, **options)
        trainer.train()
        found[mode] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert found["off"] != found["cdpo"]
    assert all(np.isfinite(found["cdpo"]))
    # -0.6 log s(h) - 0.4 log s(-h) is at least the entropy of the label.
    floor = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    slack = 0.01 if "bf16" in options else 1e-6
    assert min(found["cdpo"]) > floor - slack


@pytest.mark.parametrize("mode", ["off", "auto", "rdpo", "weights", "holder"])
def test_streamed_data(tmp_path: Path, mode: str) -> None:
    rate = {"noise_rate": 0.3} if mode in ("rdpo", "weights") else {}
    trainer = build(tmp_path, pairs(16).to_iterable_dataset(), noise=mode, max_steps=6, **rate)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    with pytest.raises(ValueError, match="map-style"):
        trainer.flip_report()


def test_a_mode_without_margins_is_an_error_and_auto_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "poprisk_integrations.trl.poprisk_dpo_trainer.ForwardRecorder.__enter__"
    blind = SimpleNamespace(policy_output=None, reference_output=None)
    monkeypatch.setattr(module, lambda self: blind)
    with pytest.raises(ValueError, match=r"Invalid noise: 'rdpo'. Per-pair margins are not"):
        build(tmp_path, noise="rdpo", noise_rate=0.3).train()
    trainer = build(tmp_path, noise="auto")
    trainer.train()
    assert trainer.state.global_step == 6
