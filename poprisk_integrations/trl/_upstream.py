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
from torch.utils.hooks import RemovableHandle
from trl.trainer.utils import selective_log_softmax, use_adapter

__all__ = [
    "LIGER_HIDES_LOG_PROBS",
    "ForwardRecorder",
    "add_metric",
    "batch_log_ratios",
    "batch_rewards",
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
    """Weight of the term `sigmoid` in the loss, and whether it is the only term."""
    weight = float(trainer.loss_weights[trainer.loss_types.index("sigmoid")])
    auxiliary = getattr(trainer, "aux_loss_enabled", False)  # TRL 1.0 has none for DPO
    return weight, len(trainer.loss_types) == 1 and not auxiliary


@contextmanager
def reference_model(trainer: Any) -> Iterator[nn.Module]:
    """What computes as the reference inside the block, by the rule of `DPOTrainer._compute_loss`.

    Raises ValueError where the trainer keeps no reference.
    """
    if trainer.ref_model is not None:
        yield trainer.accelerator.unwrap_model(trainer.ref_model)
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        raise ValueError("There is no reference model in memory (precompute_ref_log_probs).")
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        yield model


class ForwardRecorder:
    """Context manager: inside it, the first output of the policy and of the reference are kept.

    No pass is added. The reference may be a module of its own, the same module (an adapter switched
    off for a second pass), or the module inside the policy's wrapper. Hooks are gone after the
    block, whatever happened in it.

    Example:
        >>> policy, reference = nn.Identity(), nn.Identity()
        >>> with ForwardRecorder(policy, reference) as recorder:
        ...     _ = policy(torch.tensor(1.0)), reference(torch.tensor(2.0))
        >>> recorder.policy_output.item(), recorder.reference_output.item()
        (1.0, 2.0)
    """

    def __init__(self, policy: nn.Module, reference: nn.Module) -> None:
        self.policy_output: Any = None  # None: was not called
        self.reference_output: Any = None
        self._policy = policy
        self._reference = reference
        self._depth = 0  # > 0 while the policy's own forward runs
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "ForwardRecorder":
        # On the outermost module: wrappers (DDP) may call inner modules in their own way.
        self._handles = [
            self._policy.register_forward_pre_hook(self._before_policy),
            self._policy.register_forward_hook(self._after_policy),
        ]
        if self._reference is not self._policy:
            self._handles.append(self._reference.register_forward_hook(self._after_reference))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_policy(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _after_policy(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self.policy_output is None:
            self.policy_output = output
        elif self._reference is self._policy and self.reference_output is None:
            self.reference_output = output

    def _after_reference(self, module: nn.Module, args: Any, output: Any) -> None:
        # Deeper, the call is on behalf of the policy's wrapper, and not the reference's.
        if self._depth == 0 and self.reference_output is None:
            self.reference_output = output


def batch_log_ratios(
    trainer: Any, inputs: dict[str, Any], recorder: ForwardRecorder
) -> Tensor | None:
    """Log-ratios log pi(y | x) - log pi_ref(y | x) of one batch, from what its passes returned.

    `inputs` is the batch as the collator made it: 2B rows, first all chosen, then all rejected.
    Shape (B, 2), fp32, chosen then rejected; gradients flow to the policy. None where the
    configuration does not give them: that depends on it alone, so all ranks agree.
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
    if reference is None:
        return None
    return torch.stack((policy.float() - reference.detach().float()).chunk(2), dim=1)


def batch_rewards(recorder: ForwardRecorder) -> Tensor | None:
    """Rewards of one batch of `trl.RewardTrainer`, from what its pass returned; detached.

    Shape (B, 2), fp32, chosen then rejected, by the order of TRL's collator: first all chosen, then
    all rejected. None where the model does not give one number for each completion.
    """
    logits = getattr(recorder.policy_output, "logits", None)
    if not isinstance(logits, Tensor):
        return None
    rewards = logits.detach().squeeze(-1)
    if rewards.dim() != 1 or len(rewards) % 2:
        return None
    return torch.stack(rewards.float().chunk(2), dim=1)


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
