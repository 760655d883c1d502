"""One verdict per step: are all gradients finite, and so are the squares that the states hold?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.distributed import local_tensor, max_over_shards
from poprisk_integrations.optim._work import GroupWork

__all__ = ["agreed_keep", "all_finite"]


def all_finite(works: Sequence[GroupWork], checked: Sequence[bool]) -> Tensor | None:
    """1 if the step may count, 0 if it must be skipped; the same on all shards of a DTensor.

    One read of the gradients and no host sync. A gradient whose square overflows would leave an
    infinite second moment behind, so it counts as non-finite.

    Args:
        works: The gathered groups.
        checked: Which of them to look at.

    Returns:
        0-dim float32 on the first parameter's device, or None without any gradient.
    """
    if not any(work.owners for work in works):
        return None
    first = next(work.params[0] for work in works if work.params)
    works = [work for work, is_checked in zip(works, checked, strict=True) if is_checked]
    owners = [p for work in works for p in work.owners]
    batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for work in works:
        for grad in work.grads:
            if grad.numel():
                batches.setdefault((grad.device, grad.dtype), []).append(grad)
    bad = torch.zeros((), device=first.device)
    for (_, dtype), grads in batches.items():
        # The 2-norm: on CPU the maximum norm is an order of magnitude slower. A deviation from
        # the mean is at most about twice the largest gradient, and its square must be finite.
        norms = torch.stack(torch._foreach_norm(grads))
        squares = (4 * norms.to(torch.promote_types(dtype, torch.float32))).square()
        bad = torch.maximum(bad, (~torch.isfinite(squares).all()).float().to(bad.device))
    return 1.0 - max_over_shards(bad, owners)


def agreed_keep(works: Sequence[GroupWork], found_inf: Tensor) -> Tensor | None:
    """`all_finite` where GradScaler has looked at the gradients already.

    Args:
        works: The gathered groups.
        found_inf: 0-dim or 1-element, > 0 if this rank found a non-finite gradient.
    """
    owners = [p for work in works for p in work.owners]
    if not owners:
        return None
    bad = (local_tensor(found_inf).reshape(()) > 0).float()
    return 1.0 - max_over_shards(bad, owners)
