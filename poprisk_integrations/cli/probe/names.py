"""Names of parameters, from any model in the process, and the groups of layers they make."""

import gc
import re
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["layer_groups", "parameter_names"]

# What wrappers put before or between the names of the model itself.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|base_model\.model)\."
)
_UNNAMED = re.compile(r"group\d+\.param\d+")
MOST_GROUPS = 12


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
    return [_WRAPPERS.sub("", found[id(p)]) for p in params]


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


def layer_groups(names: Sequence[str], limit: int = MOST_GROUPS) -> list[str]:
    """The group of layers of each parameter: its block where layers are numbered, else its module.

        model.layers.3.mlp.up_proj.weight -> model.layers.3        lm_head.weight -> lm_head
    With more groups than `limit`, numbered ones are joined into up to four ranges; if there are
    still more, the first parts of the names decide.

    Args:
        names: Of all parameters.
        limit: Groups to have at most, if joining can make it.

    Example:
        >>> layer_groups(["embed.weight", "layers.0.a.bias", "layers.1.a.bias"])
        ['embed', 'layers.0', 'layers.1']
        >>> layer_groups([f"layers.{i}.bias" for i in range(8)], limit=4)[::2]
        ['layers.0-1', 'layers.2-3', 'layers.4-5', 'layers.6-7']
    """
    groups = [_block(name) for name in names]
    if len(set(groups)) > limit:
        numbered: dict[str, set[int]] = defaultdict(set)
        for stem, number in map(_numbered, groups):
            if number is not None:
                numbered[stem].add(number)
        groups = [_joined(group, numbered) for group in groups]
    if len(set(groups)) > limit:
        groups = [group.split(".")[0] for group in groups]
    return groups


def _block(name: str) -> str:
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: place + 1])
    return name if _UNNAMED.fullmatch(name) else ".".join(parts[:-1]) or name


def _numbered(group: str) -> tuple[str, int | None]:
    stem = group.rstrip("0123456789")
    return stem, int(group[len(stem) :]) if stem != group else None


def _joined(group: str, numbered: dict[str, set[int]]) -> str:
    stem, number = _numbered(group)
    if number is None or len(numbered[stem]) <= 4:
        return group
    order = sorted(numbered[stem])
    quarter = order.index(number) * 4 // len(order)
    members = [n for i, n in enumerate(order) if i * 4 // len(order) == quarter]
    return f"{stem}{members[0]}" + (f"-{members[-1]}" if len(members) > 1 else "")
