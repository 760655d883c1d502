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
        Shape (B, 2), fp32, detached: a row per pair, chosen then rejected.

    Example:
        >>> pair_log_ratios(torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -4.0])).tolist()
        [[1.0, -1.0]]
    """
    chosen, rejected = (policy_logps.detach().float() - ref_logps.detach().float()).chunk(2)
    return torch.stack([chosen, rejected], dim=1)


def margin_metrics(log_ratios: Tensor, beta: float) -> dict[str, float]:
    """Summary of the pairs that were seen since the last log.

        margin = beta * (log-ratio of chosen - log-ratio of rejected)

    `poprisk/kl_data` is the mean log-ratio over the completions of the data, chosen and rejected
    alike. It is not the on-policy KL divergence, which is a mean over the policy's own samples:
    this one can be negative, and falls while the policy moves away from the completions of the
    data.

    Args:
        log_ratios: Shape (N, 2), as `pair_log_ratios` returns them, of all ranks.
        beta: DPO's beta: margins are on the scale of TRL's `rewards/margins`.

    Returns:
        `poprisk/kl_data` (nats per completion), `poprisk/margin_p10` and `poprisk/margin_p50`;
        nothing where no pair was seen. One host sync.

    Example:
        >>> margin_metrics(torch.tensor([[1.0, -1.0], [3.0, -3.0]]), beta=0.5)["poprisk/margin_p50"]
        2.0
    """
    if not log_ratios.numel():
        return {}
    margins = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    quantiles = torch.quantile(margins, margins.new_tensor([0.1, 0.5]))
    kl_data, p10, p50 = torch.cat([log_ratios.mean().reshape(1), quantiles]).tolist()
    return {"poprisk/kl_data": kl_data, "poprisk/margin_p10": p10, "poprisk/margin_p50": p50}
