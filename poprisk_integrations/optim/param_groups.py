"""Parameter groups by name: decay or not, gated or not."""

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    no_gate: Iterable[str] = (),
    weight_decay: float = 1e-2,
    no_decay: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters by weight decay and gate.

    Args:
        model: The model, before it is wrapped or sharded.
        no_gate: Substrings of parameter names whose group gets `gate="none"`, e.g. embeddings
            (rarely hit rows look like noise) and routers. Upper and lower case are the same:
            "norm" finds `LayerNorm` too.
        weight_decay: Decay of the decayed groups.
        no_decay: The same for parameters without weight decay; None for the usual rule:
            no decay for biases and for parameters of normalisation layers.

    Returns:
        Up to four groups, empty ones left out, for `PopRiskAdamW(...)` or any AdamW that ignores
        unknown keys. Shared parameters appear once.

    Raises:
        ValueError: If a pattern matches no parameter, or the model has none to train.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4)})
        >>> for group in param_groups(model, no_gate=["embed"], weight_decay=0.1):
        ...     print(group["weight_decay"], group.get("gate", "gated"), len(group["params"]))
        0.1 gated 1
        0.1 none 1
        0.0 gated 1
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("Invalid model: it has no parameter that requires a gradient.")
    names = [name for name, _ in named]
    ungated = _matching(names, no_gate, "no_gate")
    undecayed = (
        _usual_no_decay(model) if no_decay is None else _matching(names, no_decay, "no_decay")
    )
    groups = []
    for decay in (True, False):
        for gated in (True, False):
            params = [
                p
                for name, p in named
                if (name not in undecayed, name not in ungated) == (decay, gated)
            ]
            if params:
                group: dict[str, Any] = {
                    "params": params,
                    "weight_decay": weight_decay if decay else 0.0,
                }
                groups.append(group if gated else {**group, "gate": "none"})
    return groups


def _matching(names: list[str], patterns: Iterable[str], argument: str) -> set[str]:
    if isinstance(patterns, str):
        patterns = (patterns,)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if pattern.lower() in name.lower()}
        if not hits:
            parts = dict.fromkeys(part for name in names for part in name.split("."))
            words = [part for part in parts if not part.isdigit()]
            raise ValueError(
                f"Invalid {argument}: {pattern!r} matches no parameter name. Names look like "
                f"{names[0]!r}; their parts are {', '.join(words)}."
            )
        found |= hits
    return found


def _usual_no_decay(model: nn.Module) -> set[str]:
    found = set()
    for prefix, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False):
            if name.endswith("bias") or is_norm:
                found.add(f"{prefix}.{name}" if prefix else name)
    return found
