"""Canaries: what we take from TRL beyond its documented interface is still there."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, RewardTrainer

from poprisk_integrations.trl import _upstream
from poprisk_integrations.trl._upstream import ForwardRecorder
from tests.helpers.tiny_dpo import (
    config_options,
    needs_trl,
    pairs,
    sequence_log_probs,
    tiny_model,
    tiny_tokenizer,
)

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def trainer(tmp_path: Path) -> DPOTrainer:
    return DPOTrainer(
        tiny_model(),
        tiny_model(1),
        DPOConfig(**config_options(tmp_path)),
        train_dataset=pairs(),
        processing_class=tiny_tokenizer(),
    )


def test_metrics_are_averaged_and_reset_by_log(trainer: DPOTrainer) -> None:
    trainer.model.train()
    _upstream.add_metric(trainer, "poprisk/x", 1.0)
    _upstream.add_metric(trainer, "poprisk/x", 2.0)
    trainer.log({"loss": 0.0})
    assert trainer.state.log_history[-1]["poprisk/x"] == 1.5
    trainer.log({"loss": 0.0})
    assert "poprisk/x" not in trainer.state.log_history[-1]
    trainer.model.eval()
    _upstream.add_metric(trainer, "poprisk/x", 3.0)
    trainer.log({"eval_loss": 0.0})
    assert trainer.state.log_history[-1]["eval_poprisk/x"] == 3.0


def test_constructor_still_takes_our_positions() -> None:
    names = list(inspect.signature(DPOTrainer.__init__).parameters)[1:10]
    assert names == [
        "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset",
        "processing_class", "compute_metrics", "callbacks",
    ]  # fmt: skip
    compute_loss = list(inspect.signature(DPOTrainer.compute_loss).parameters)
    assert compute_loss == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


def test_a_reward_trainer_still_takes_our_positions() -> None:
    names = list(inspect.signature(RewardTrainer.__init__).parameters)[1:9]
    assert names == [
        "model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
        "compute_metrics", "callbacks",
    ]  # fmt: skip
    compute_loss = list(inspect.signature(RewardTrainer.compute_loss).parameters)
    assert compute_loss == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


def test_rewards_are_those_of_the_halves_of_a_batch() -> None:
    def found(**output: Tensor) -> Tensor | None:
        recorder = ForwardRecorder(nn.Identity(), nn.Identity())
        recorder.policy_output = SimpleNamespace(**output)
        return _upstream.batch_rewards(recorder)

    one_pair = found(logits=torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(one_pair, torch.tensor([[1.0, 2.0]]))
    two_pairs = found(logits=torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True))
    torch.testing.assert_close(two_pairs, torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
    assert found(loss=torch.tensor(1.0)) is None
    assert found(logits=torch.zeros(3, 1)) is None
    assert found(logits=torch.zeros(4, 2)) is None


@pytest.mark.parametrize(
    "output", [pytest.param("log_probs", marks=needs_trl("1.15", "a fused head")), "logits"]
)
def test_log_ratios_equal_those_from_the_logits(trainer: DPOTrainer, output: str) -> None:
    inputs = next(iter(trainer.get_train_dataloader()))
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    keywords = {"labels": labels, "fused_lm_head": True} if output == "log_probs" else {}
    models = (trainer.model, trainer.ref_model)
    outputs = [
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"], **keywords)
        for model in models
    ]
    assert getattr(outputs[0], output) is not None
    recorder = SimpleNamespace(policy_output=outputs[0], reference_output=outputs[1])
    found = _upstream.batch_log_ratios(trainer, inputs, recorder)
    with torch.no_grad():
        policy, reference = (sequence_log_probs(model, inputs) for model in models)
    expected = (policy - reference).reshape(2, -1).T  # a row per pair, chosen first
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    assert found.requires_grad


@pytest.mark.parametrize("missing", ["policy", "reference", "mask", "shape", "fields"])
def test_no_log_ratios_where_something_is_missing(trainer: DPOTrainer, missing: str) -> None:
    mask = torch.ones(4, 6)
    whole = SimpleNamespace(log_probs=torch.zeros(4, 5))
    odd = {
        "shape": SimpleNamespace(log_probs=torch.zeros(4, 3)),
        "fields": SimpleNamespace(loss=0.0),
    }
    recorder = SimpleNamespace(
        policy_output=None if missing == "policy" else odd.get(missing, whole),
        reference_output=None if missing == "reference" else whole,
    )
    inputs = {} if missing == "mask" else {"completion_mask": mask}
    assert _upstream.batch_log_ratios(trainer, inputs, recorder) is None


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Wrapper(nn.Module):
    """Calls the module inside it, as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + 100.0


def arrangement(name: str) -> tuple[nn.Module, Scale]:
    reference = Scale(2.0)
    policy = {"two models": Scale(2.0), "one module": reference, "wrapped": Wrapper(reference)}
    return policy[name], reference


@pytest.mark.parametrize(
    ("name", "expected"), [("two models", 2.0), ("one module", 2.0), ("wrapped", 102.0)]
)
def test_what_policy_and_reference_return_is_kept(name: str, expected: float) -> None:
    policy, reference = arrangement(name)
    with ForwardRecorder(policy, reference) as recorder:
        policy(torch.tensor(1.0))
        assert recorder.reference_output is None  # not the policy's own call of it
        reference.factor = 5.0  # the adapter is off
        reference(torch.tensor(1.0))
        policy(torch.tensor(7.0))  # further passes are not of interest
        reference(torch.tensor(7.0))
    assert (recorder.policy_output, recorder.reference_output) == (expected, 5.0)
    with pytest.raises(TypeError), ForwardRecorder(policy, reference):
        policy("not a tensor")
    for module in (policy, reference):  # also after an error
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
