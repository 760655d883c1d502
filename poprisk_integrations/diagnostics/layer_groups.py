"""Which parameters are looked at together: layers, by the names of a model's parameters."""

import re
from collections.abc import Callable, Iterable

__all__ = ["MOST_GROUPS", "LayerNaming", "check_per_layer", "layer_groups"]

MOST_GROUPS = 30  # curves that a tracker still shows side by side
REST = "rest"

LayerNaming = bool | int | Callable[[str], str | None]

# What wrappers put into the names of parameters.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
    r"base_model\.model)\."
)


def layer_groups(names: Iterable[str], per_layer: LayerNaming = True) -> dict[str, str]:
    """The layer group of each parameter that is in one.

    True takes the first numbered block of a name ("model.layers.3"), else the module that holds
    the parameter ("model.embed_tokens", "lm_head"). Where that makes more than `MOST_GROUPS`,
    neighbouring blocks go together ("model.layers.0-3"), and then names are cut shorter.

    Args:
        names: Of parameters, as `named_parameters` gives them. What FSDP, DDP, torch.compile
            and PEFT put into names is left out.
        per_layer: True; the number of parts of a name to keep, at most all but the last; or a
            function from a name to its group, or to None for no group. False puts none in one.

    Returns:
        Names as they came, in their order, and their groups.

    Example:
        >>> layer_groups(["embed.weight", "layers.0.up.weight", "layers.0.up.bias", "bias"])
        {'embed.weight': 'embed', 'layers.0.up.weight': 'layers.0', 'layers.0.up.bias': 'layers.0', 'bias': 'bias'}
    """  # noqa: E501
    if per_layer is False:
        return {}
    clean = {name: _WRAPPERS.sub("", name) for name in names}
    if callable(per_layer):
        found = {name: per_layer(short) for name, short in clean.items()}
        return {name: str(group) for name, group in found.items() if group is not None}
    if per_layer is not True:
        return {name: _cut(short, per_layer) for name, short in clean.items()}
    groups = {name: _block(short) for name, short in clean.items()}
    width, longest = 1, max((_number(g) for g in groups.values()), default=0)
    while len(set(groups.values())) > MOST_GROUPS and width <= longest:
        width *= 2
        groups = {name: _block(short, width) for name, short in clean.items()}
    depth = max((g.count(".") for g in groups.values()), default=0)
    while len(set(groups.values())) > MOST_GROUPS and depth > 0:
        groups = {name: ".".join(group.split(".")[:depth]) for name, group in groups.items()}
        depth -= 1
    kept = list(dict.fromkeys(groups.values()))
    if len(kept) <= MOST_GROUPS:
        return groups
    kept = kept[: MOST_GROUPS - 1]
    return {name: group if group in kept else REST for name, group in groups.items()}


def check_per_layer(per_layer: LayerNaming) -> None:
    """Refuse what `layer_groups` cannot read.

    Raises:
        ValueError: If it is neither a bool, an integer >= 1 nor callable.
    """
    is_depth = type(per_layer) is int and per_layer >= 1
    if not (isinstance(per_layer, bool) or is_depth or callable(per_layer)):
        raise ValueError(
            f"Invalid per_layer: {per_layer!r}. Must be True, False, an integer >= 1 (parts of a "
            "parameter's name) or a function from a name to its group."
        )


def _cut(name: str, depth: int) -> str:
    parts = name.split(".")
    return ".".join(parts[: min(depth, max(1, len(parts) - 1))])


def _block(name: str, width: int = 1) -> str:
    """Up to the first number, or the module; `width` blocks share one name."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if at is None:
        return _cut(name, len(parts))
    start = int(parts[at]) // width * width
    number = parts[at] if width == 1 else f"{start}-{start + width - 1}"
    return ".".join([*parts[:at], number])


def _number(group: str) -> int:
    last = group.rsplit(".", 1)[-1]
    return int(last) if last.isdecimal() else 0
