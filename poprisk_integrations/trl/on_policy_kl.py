"""KL divergence from the reference on the policy's own samples."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["on_policy_kl", "summed_kl"]


def on_policy_kl(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Sample from the policy and sum the exact KL divergence at every position.

        KL(pi || pi_ref) = E_{y ~ pi} sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t))

    Unbiased for completions of up to `max_new_tokens` tokens, with far less variance than the
    log-ratio of the samples, since only the path is sampled. One completion per prompt at
    temperature 1. Random number generators are left as they were.

    Args:
        policy: A causal model of transformers, unwrapped and not sharded.
        reference: Gives a context in which its value computes as the reference.
        prompts: Token ids.
        max_new_tokens: Longest completion.
        eos_token_id: Ends a completion.
        seed: Of the samples.

    Returns:
        Mean in nats per completion, and its standard error (NaN for one prompt).
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
    kl = torch.tensor(values, dtype=torch.float64)
    error = float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else math.nan
    return float(kl.mean()), error


def summed_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Sum over positions of the KL divergence between next-token distributions.

    Args:
        logits: Shape (T, V), of the policy.
        reference_logits: Same of the reference.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> round(summed_kl(logits, torch.tensor([[0.0, 1.0]])).item(), 4)
        0.1201
    """
    log_p = logits.float().log_softmax(-1)
    log_q = reference_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
