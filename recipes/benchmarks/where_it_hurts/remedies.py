"""Arms with part of the model exempt from the gate, and other remedies, by name."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from gate_harness.arms import ARMS, BETAS, CONTROLS, GATES, Arm, control
from gate_harness.stacked_adam import EPS, StackedAdam
from torch import Tensor

__all__ = ["REMEDIES", "WARMUP", "ExemptAdam", "ExemptArm", "arm_named", "exempt_spans"]

REMEDIES = ("no_gate", "blend", "warmup")
WARMUP = 100  # steps


@dataclass(frozen=True, kw_only=True)
class ExemptArm(Arm):
    """A gated arm of which some tensors step as under AdamW.

    Args:
        exempt: Places of these tensors in the order of the model's parameters.
    """

    exempt: tuple[int, ...] = ()


class ExemptAdam(StackedAdam):
    """`StackedAdam` that knows `ExemptArm`: per member `PopRiskAdamW` with two parameter groups."""

    def __init__(self, arm: Arm, sizes: list[int], *rest: Any) -> None:
        super().__init__(arm, sizes, *rest)
        self.spans = exempt_spans(sizes, arm.exempt if isinstance(arm, ExemptArm) else ())

    def _move(self, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The gated update, with AdamW's own in the exempt columns."""
        move, gate = super()._move(grad, states)
        if gate is None:
            return move, None
        beta1, beta2 = BETAS
        for span in self.spans:
            mean = states[0][:, span] / (1 - beta1**self.at)
            square = states[1][:, span] / (1 - beta2**self.at)
            move[:, span] = mean / (square.sqrt() + EPS)
            gate[:, span] = 1.0
        return move, gate


def exempt_spans(sizes: list[int], exempt: tuple[int, ...]) -> list[slice]:
    """Columns of the exempt tensors in a member's row.

    Example:
        >>> exempt_spans([4, 1, 6], (0, 2))
        [slice(0, 4, None), slice(5, 11, None)]
    """
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(ends[i] - sizes[i], ends[i]) for i in exempt]


def arm_named(name: str, tensors: list[str], affected: tuple[str, ...]) -> Arm:
    """The arm of this name for one model.

    `no_gate(X)`: gate X everywhere but on the affected tensors. `only(X)`: on these alone.
    `blend(X)`: w = 0.5. `warmup(X)`: the first `WARMUP` steps ungated. `norm(X)`, `mask(X)`,
    `ratio(X)`: the harness's controls. Else: an arm of the harness.

    Args:
        name: Of the arm; X is one of the harness's gates.
        tensors: The model's parameter names, in their order.
        affected: Substrings of the affected ones, as for `param_groups(no_gate=...)`.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in ARMS:
        return ARMS[name]
    match = re.fullmatch(r"(no_gate|only|blend|warmup|norm|mask|ratio)\((.+)\)", name)
    if match is None or match[2] not in GATES:
        raise ValueError(f"Invalid arm: {name!r}. Gates: {list(GATES)}; remedies: {REMEDIES}.")
    kind, gate = match[1], GATES[match[2]]
    if kind in CONTROLS:
        return control(kind, gate.name)
    if kind == "blend":
        return replace(gate, name=name, gate_blend=0.5)
    if kind == "warmup":
        return replace(gate, name=name, gate_warmup=WARMUP)
    hit = [any(part in tensor for part in affected) for tensor in tensors]
    exempt = tuple(i for i, is_hit in enumerate(hit) if is_hit == (kind == "no_gate"))
    options = {field.name: getattr(gate, field.name) for field in fields(Arm)}
    return ExemptArm(**{**options, "name": name, "exempt": exempt})
