"""Log-ratios of preference pairs, and what a batch of them says about a run."""

import torch
from torch import Tensor

__all__ = ["margin_metrics", "pair_log_ratios"]


def pair_log_ratios(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-ratio policy / reference of both completions of each pair.

        log pi(y | x) - log pi_ref(y | x)

    Args:
        policy_logps: Shape (2B,): sequence log-probabilities, first all chosen, then all rejected.
        ref_logps: Same under the reference.

    Returns:
        Shape (B, 2), fp32: a row per pair, chosen then rejected. Gradients flow to the policy.

    Example:
        >>> pair_log_ratios(torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -4.0])).tolist()
        [[1.0, -1.0]]
    """
    chosen, rejected = (policy_logps.float() - ref_logps.detach().float()).chunk(2)
    return torch.stack([chosen, rejected], dim=1)


def margin_metrics(
    log_ratios: Tensor, beta: float, suspect: Tensor | None = None
) -> dict[str, float]:
    """Summary of the pairs that were seen since the last log.

        margin = beta * (log-ratio of chosen - log-ratio of rejected)

    `poprisk/kl_data` is the mean log-ratio over the completions of the data, chosen and rejected
    alike. It is not the on-policy KL divergence, which is a mean over the policy's own samples:
    this one can be negative, and falls while the policy moves away from the completions of the
    data.

    `poprisk/reward_accuracy` is the share of pairs that are ranked as labelled, equal rewards
    counted half: 0.5 in the first step, where policy and reference are the same.

    With `suspect`, the quantiles of both kinds of pairs as `..._clean` and `..._suspect`, and
    `poprisk/flips_fitted`: the share of the suspect pairs that the model now ranks as their
    label says. Near 0 wrong labels are resisted, near 1 they are memorised; the accuracy on the
    training labels (`rewards/accuracies`) rises with both.

    Args:
        log_ratios: Shape (N, 2), as `pair_log_ratios` returns them, of all ranks.
        beta: DPO's beta: margins are on the scale of TRL's `rewards/margins`.
        suspect: Boolean, shape (N,): pairs whose label is more probably wrong than right.

    Returns:
        `poprisk/kl_data` (nats per completion), `poprisk/margin_p10`, `poprisk/margin_p50` and so
        on; nothing where no pair was seen. A host sync.

    Example:
        >>> margin_metrics(torch.tensor([[1.0, -1.0], [3.0, -3.0]]), beta=0.5)["poprisk/margin_p50"]
        2.0
    """
    if not log_ratios.numel():
        return {}
    margins = (beta * (log_ratios[:, 0] - log_ratios[:, 1])).cpu()
    found = {
        "poprisk/kl_data": float(log_ratios.mean()),
        "poprisk/reward_accuracy": float(
            ((margins > 0).float() + (margins >= 0).float()).mean() / 2
        ),
        **_quantiles(margins, ""),
    }
    if suspect is not None:
        suspect = suspect.cpu()
        found |= _quantiles(margins[~suspect], "_clean") | _quantiles(margins[suspect], "_suspect")
        if bool(suspect.any()):
            found["poprisk/flips_fitted"] = float((margins[suspect] > 0).float().mean())
    return found


def _quantiles(margins: Tensor, kind: str) -> dict[str, float]:
    if not margins.numel():
        return {}
    p10, p50 = torch.quantile(margins, margins.new_tensor([0.1, 0.5])).tolist()
    return {f"poprisk/margin_p10{kind}": p10, f"poprisk/margin_p50{kind}": p50}
