"""KL divergence from the reference on the policy's own samples."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

__all__ = ["check_on_policy_kl", "on_policy_kl", "summed_kl"]


def on_policy_kl(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> float:
    """Sample from the policy and sum the exact KL divergence at every position, in nats.

        KL(pi || pi_ref) = E_{y ~ pi} sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t))

    The mean over completions; unbiased for those of up to `max_new_tokens` tokens, with far less
    variance than the log-ratio of the samples, since only the path is sampled. One completion per
    prompt (token ids) at temperature 1. The policy is a causal model of transformers, unwrapped and
    not sharded; `reference` gives a context in which its value computes as the reference. Random
    number generators are left as they were.
    """
    device = next(policy.parameters()).device
    was_training = policy.training
    values = []
    devices = [device] if device.type == "cuda" else []
    try:
        policy.eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for prompt in prompts:
                x = torch.tensor([list(prompt)], device=device)
                model: Any = policy
                y = model.generate(
                    x,
                    attention_mask=torch.ones_like(x),
                    max_new_tokens=max_new_tokens,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    eos_token_id=eos_token_id,
                    pad_token_id=eos_token_id,
                )
                own = model(y).logits[0, x.shape[1] - 1 : -1]
                with reference() as other:
                    theirs = other(y).logits[0, x.shape[1] - 1 : -1]
                values.append(float(summed_kl(own, theirs)))
    finally:
        policy.train(was_training)
    return float(torch.tensor(values, dtype=torch.float64).mean())


def summed_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Sum over positions of the KL divergence between next-token distributions; logits (T, V).

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> round(summed_kl(logits, torch.tensor([[0.0, 1.0]])).item(), 4)
        0.1201
    """
    log_p = logits.float().log_softmax(-1)
    log_q = reference_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def check_on_policy_kl(trainer: Any) -> None:
    """Refuse `on_policy_kl_samples` where there is nothing to sample from or with."""
    samples = trainer.args.on_policy_kl_samples
    if not samples:
        return
    if trainer.ref_model is None and not hasattr(trainer.model, "peft_config"):
        raise ValueError(
            f"Invalid on_policy_kl_samples: {samples}. With precompute_ref_log_probs no reference "
            "model is in memory: set it to 0."
        )
    data = trainer.train_dataset
    if not isinstance(data, Dataset) or "prompt_ids" not in data.column_names:
        raise ValueError(
            f"Invalid on_policy_kl_samples: {samples}. Prompts are taken from map-style training "
            "data of texts: set it to 0."
        )
