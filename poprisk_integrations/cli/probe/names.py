"""Names of parameters, from any model in the process."""

import gc
import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["parameter_names"]

_UNNAMED = re.compile(r"group\d+\.param\d+")


def parameter_names(optimizer: Optimizer, params: Sequence[Tensor]) -> list[str]:
    """Names in the model that the parameters belong to; "group0.param3" for want of one.

    The optimizer's own names (torch >= 2.6, if it was given named parameters), else those of the
    modules in this process, outermost first.

    Args:
        optimizer: Holds the parameters.
        params: Some of them.

    Example:
        >>> from torch.optim import SGD
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> parameter_names(SGD(model.parameters(), lr=0.1), list(model.parameters()))
        ['0.weight', '0.bias']
    """
    found: dict[int, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names") or []
        for place, param in enumerate(group["params"]):
            named = place < len(given)
            found[id(param)] = given[place] if named else f"group{number}.param{place}"
    unnamed = {id(p) for p in params if _UNNAMED.fullmatch(found[id(p)])}
    for root in _modules_with(unnamed) if unnamed else ():
        for name, param in root.named_parameters():
            if id(param) in unnamed:
                found[id(param)] = name
                unnamed.discard(id(param))
    return [found[id(p)] for p in params]


def _modules_with(wanted: set[int]) -> list[nn.Module]:
    """Modules that hold any of these parameters and are inside no other one, the largest first."""
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    holders: list[nn.Module] = []
    inside: set[int] = set()
    for module in modules:
        if not wanted.isdisjoint(map(id, module.parameters())):
            holders.append(module)
            inside.update(id(child) for child in module.modules() if child is not module)
    roots = [m for m in holders if id(m) not in inside]
    return sorted(roots, key=lambda m: -sum(id(p) in wanted for p in m.parameters()))
