"""Canaries: what we take from TRL beyond its documented interface is still there."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from poprisk_integrations.trl import _upstream
from poprisk_integrations.trl.pair_log_ratios import pair_log_ratios
from tests.helpers.tiny_dpo import config_options, pairs, tiny_model, tiny_tokenizer
from tests.helpers.trl_versions import needs_trl

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


def test_term_of_the_pairs(trainer: DPOTrainer) -> None:
    assert _upstream.pair_term(trainer) == (1.0, True)
    trainer.loss_types, trainer.loss_weights = ["sft", "sigmoid"], [0.5, 2.0]
    assert _upstream.pair_term(trainer) == (2.0, False)
    trainer.loss_types, trainer.aux_loss_enabled = ["sigmoid"], True
    assert not _upstream.pair_term(trainer)[1]


def test_constructor_still_takes_our_positions() -> None:
    names = list(inspect.signature(DPOTrainer.__init__).parameters)[1:10]
    assert names == [
        "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset",
        "processing_class", "compute_metrics", "callbacks",
    ]  # fmt: skip
    compute_loss = list(inspect.signature(DPOTrainer.compute_loss).parameters)
    assert compute_loss == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


def batch(trainer: DPOTrainer) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def plain_log_probs(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Sequence log-probabilities straight from the logits, in float64."""
    with torch.no_grad():
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    log_probs = logits.double().log_softmax(-1)[:, :-1]
    tokens = log_probs.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * inputs["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize(
    "output", [pytest.param("log_probs", marks=needs_trl("1.15", "a fused head")), "logits"]
)
def test_log_ratios_equal_those_from_the_logits(trainer: DPOTrainer, output: str) -> None:
    inputs = batch(trainer)
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
    expected = pair_log_ratios(*(plain_log_probs(model, inputs) for model in models))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


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
