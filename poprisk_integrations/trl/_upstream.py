"""All that this layer takes from TRL beyond its documented interface, in one place.

`tests/unit/trl/test_upstream.py` fails first when TRL moves one of these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor, nn
from trl.trainer.utils import selective_log_softmax, use_adapter

from poprisk_integrations.trl.forward_recorder import ForwardRecorder
from poprisk_integrations.trl.pair_log_ratios import pair_log_ratios

__all__ = [
    "LIGER_HIDES_LOG_PROBS",
    "add_metric",
    "batch_log_ratios",
    "current_mode",
    "pair_term",
    "reference_model",
]

# Until then use_liger_kernel had a fused loss of its own, which returns no log-probabilities.
LIGER_HIDES_LOG_PROBS = Version(trl.__version__) < Version("1.14")


def current_mode(trainer: Any) -> str:
    """Whether the trainer trains or evaluates, by the rule of `DPOTrainer.log`."""
    return "train" if trainer.model.training else "eval"


def add_metric(trainer: Any, name: str, value: float) -> None:
    """Have the trainer's next `log` report a number (the mean, if called more than once)."""
    trainer._metrics[current_mode(trainer)][name].append(value)


def pair_term(trainer: Any) -> tuple[float, bool]:
    """Weight of the term `sigmoid` in the loss, and whether it is the only term.

    Raises:
        ValueError: If there is no such term.
    """
    weight = float(trainer.loss_weights[trainer.loss_types.index("sigmoid")])
    auxiliary = getattr(trainer, "aux_loss_enabled", False)  # TRL 1.0 has none for DPO
    return weight, len(trainer.loss_types) == 1 and not auxiliary


@contextmanager
def reference_model(trainer: Any) -> Iterator[nn.Module]:
    """What computes as the reference inside the block, by the rule of `DPOTrainer._compute_loss`.

    Raises:
        ValueError: If the trainer keeps no reference.
    """
    if trainer.ref_model is not None:
        yield trainer.accelerator.unwrap_model(trainer.ref_model)
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        raise ValueError("There is no reference model in memory (precompute_ref_log_probs).")
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        yield model


def batch_log_ratios(
    trainer: Any, inputs: dict[str, Any], recorder: ForwardRecorder
) -> Tensor | None:
    """Log-ratios of one batch from what its forward passes returned.

    Args:
        trainer: The trainer whose loss was computed.
        inputs: The batch as the collator made it: 2B rows, first all chosen, then all rejected.
        recorder: The outputs of its forward passes.

    Returns:
        Shape (B, 2), see `pair_log_ratios`, with gradients where the policy's output has them;
        None where the configuration does not give them. That depends on the configuration alone,
        so all ranks agree on it.
    """
    policy = _sequence_log_probs(recorder.policy_output, inputs)
    if policy is None:
        return None
    if not trainer.args.precompute_ref_log_probs:
        reference = _sequence_log_probs(recorder.reference_output, inputs)
    elif trainer.args.ld_alpha is None and "ref_chosen_logps" in inputs:
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        reference = None  # precomputed with LD-DPO's token weights: not the same quantity
    return None if reference is None else pair_log_ratios(policy, reference)


def _sequence_log_probs(output: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Sum of the completion tokens' log-probabilities, shape (2B,), or None if not to be had."""
    mask = inputs.get("completion_mask")
    if output is None or mask is None:
        return None
    mask = mask[:, 1:]
    token_log_probs = getattr(output, "log_probs", None)  # TRL >= 1.15: fused LM head
    if token_log_probs is None:
        logits = getattr(output, "logits", None)
        if logits is None:
            return None
        # Prompt-learning adapters put virtual tokens in front, hence positions from the end.
        logits = logits[:, -mask.size(1) - 1 : -1]
        targets = inputs["input_ids"][:, 1:]
        if logits.shape[:2] != targets.shape:
            return None
        # Row by row inside: a second full-size copy of the logits could exhaust the memory.
        token_log_probs = selective_log_softmax(logits, targets)
    token_log_probs = token_log_probs[:, -mask.size(1) :]
    if token_log_probs.shape != mask.shape:
        return None
    log_probs: Tensor = (token_log_probs.float() * mask).sum(dim=1)
    return log_probs
