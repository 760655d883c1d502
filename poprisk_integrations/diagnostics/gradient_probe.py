"""What a short history of gradients says about gates, batch size and noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from poprisk_integrations.diagnostics.gradient_history import GradientHistory
from poprisk_integrations.diagnostics.group_probe import GroupProbe, GroupSums
from poprisk_integrations.diagnostics.preset_probe import (
    PresetProbe,
    judge_preset,
    usable_presets,
)
from poprisk_integrations.diagnostics.shadow_gate import run_shadow_gates
from poprisk_integrations.diagnostics.snr_distribution import abs_t_probabilities

__all__ = ["SHORTEST_PROBE", "GradientProbe", "probe_gradients"]

SHORTEST_PROBE = 8  # optimizer steps: with fewer, a coordinate's own noise is hardly known

_CLIP_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientProbe:
    """All that was measured of one optimizer's gradients.

    Attributes:
        steps: Steps that were measured.
        nonfinite: Steps left out for a non-finite gradient.
        clipped: Steps whose gradient norm equals the largest one: clipped, if more than two.
        sampled: Share of the coordinates that was looked at.
        betas: Of Adam: the optimizer's own, or PopRiskAdamW's defaults.
        batch_size: Examples per step, b; None if unknown.
        dataset_size: Training examples, n; None if unknown.
        total: All parameters.
        groups: Groups of layers, in the optimizer's order.
        presets: Boundaries; "finite" only where both sizes are known and n > b.
    """

    steps: int
    nonfinite: int
    clipped: int
    sampled: float
    betas: tuple[float, float]
    batch_size: int | None
    dataset_size: int | None
    total: GroupProbe
    groups: tuple[GroupProbe, ...]
    presets: tuple[PresetProbe, ...]

    def preset(self, name: str) -> PresetProbe:
        """A preset by name."""
        return next(preset for preset in self.presets if preset.name == name)


@torch.no_grad()
def probe_gradients(
    history: GradientHistory,
    layers: Sequence[str],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    rho: float = 0.99,
    batch_size: int | None = None,
    dataset_size: int | None = None,
) -> GradientProbe:
    """Measure a history.

    Args:
        history: At least eight steps.
        layers: Group of each of its tensors.
        betas: Of Adam, for the gates' averages.
        rho: Decay of the gates' noise.
        batch_size: Examples per step; None if unknown.
        dataset_size: Training examples; None if unknown.

    Raises:
        ValueError: If there are too few steps or no gradient.
    """
    steps = len(history)
    if steps < SHORTEST_PROBE or not any(history.present):
        raise ValueError(f"Invalid history: {steps} steps. Must be >= {SHORTEST_PROBE}.")
    if len(layers) != len(history.numels):
        raise ValueError(f"Invalid layers: {len(layers)} for {len(history.numels)} tensors.")
    names = list(dict.fromkeys(n for n, here in zip(layers, history.present, strict=True) if here))
    sums = {name: GroupSums(steps) for name in names}
    alive_weight, group = [], []
    for position, values in enumerate(history.values.split_with_sizes(history.counts, dim=1)):
        count, name = history.counts[position], layers[position]
        here = history.present[position]
        weight = history.numels[position] / count if here else 0.0
        group.append(torch.full((count,), names.index(name) if here else 0))
        alive_weight.append((values != 0).any(0) * weight)
        if here:
            sums[name].add(values, weight, history.numels[position])
    total = GroupSums(steps)
    for part in sums.values():
        total.merge(part)
    probabilities = abs_t_probabilities(steps)
    whole = total.finish("all", probabilities)
    groups = tuple(part.finish(name, probabilities) for name, part in sums.items())
    presets = usable_presets(betas[0], batch_size, dataset_size)
    shadows = run_shadow_gates(
        history.values,
        torch.cat(alive_weight),
        torch.cat(group),
        [alpha for _, alpha in presets],
        betas=betas,
        rho=rho,
    )
    largest = max(history.norms)
    return GradientProbe(
        steps=steps,
        nonfinite=history.nonfinite,
        clipped=sum(norm >= largest * (1 - _CLIP_TOLERANCE) for norm in history.norms),
        sampled=total.sampled / total.parameters,
        betas=betas,
        batch_size=batch_size,
        dataset_size=dataset_size,
        total=whole,
        groups=groups,
        presets=tuple(
            judge_preset(preset.name, alpha, betas[0], whole, groups, shadow)
            for (preset, alpha), shadow in zip(presets, shadows, strict=True)
        ),
    )
