"""What a short history of gradients says about gates, batch size and noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from poprisk_integrations.diagnostics.probe.gates import (
    DEFAULT_PRESET,
    STRICT_PRESET,
    PresetProbe,
    judge_preset,
    run_shadow_gates,
    usable_presets,
)
from poprisk_integrations.diagnostics.probe.history import GradientHistory
from poprisk_integrations.diagnostics.probe.signal import SNR_GRID, GroupProbe, GroupSums

__all__ = [
    "DEFAULT_PRESET",
    "SHORTEST_PROBE",
    "SNR_GRID",
    "STRICT_PRESET",
    "GradientHistory",
    "GradientProbe",
    "GroupProbe",
    "PresetProbe",
    "probe_gradients",
]

SHORTEST_PROBE = 8  # optimizer steps: with fewer, a coordinate's own noise is hardly known
_CLIP_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientProbe:
    """All that was measured of one optimizer's gradients."""

    steps: int  # that were measured
    nonfinite: int  # steps left out for a non-finite gradient
    clipped: int  # steps whose gradient norm equals the largest one: clipped, if more than two
    sampled: float  # share of the coordinates that was looked at
    betas: tuple[float, float]  # of Adam: the optimizer's own, or PopRiskAdamW's defaults
    batch_size: int | None  # examples per step, b
    dataset_size: int | None  # training examples, n
    total: GroupProbe
    groups: tuple[GroupProbe, ...]  # of layers, in the optimizer's order
    presets: tuple[PresetProbe, ...]  # "finite" only where both sizes are known and n > b

    def preset(self, name: str) -> PresetProbe:
        """A preset by name."""
        return next(preset for preset in self.presets if preset.name == name)


@torch.no_grad()
def probe_gradients(
    history: GradientHistory,
    layers: Sequence[str],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    batch_size: int | None = None,
    dataset_size: int | None = None,
) -> GradientProbe:
    """Measure a history of at least eight steps; `layers` names the group of each tensor.

    Raises:
        ValueError: If there are too few steps or no gradient.
    """
    steps = len(history)
    if steps < SHORTEST_PROBE or not any(history.present):
        raise ValueError(f"Invalid history: {steps} steps. Must be >= {SHORTEST_PROBE}.")
    if len(layers) != len(history.numels):
        raise ValueError(f"Invalid layers: {len(layers)} for {len(history.numels)} tensors.")
    sums: dict[str, GroupSums] = {}
    alive_weight, group = [], []
    parts = history.values.split_with_sizes(history.counts, dim=1)
    for name, values, numel, here in zip(
        layers, parts, history.numels, history.present, strict=True
    ):
        count = values.shape[1]
        weight = numel / count if here else 0.0
        if here:
            sums.setdefault(name, GroupSums(steps)).add(values, weight, numel)
        group.append(torch.full((count,), list(sums).index(name) if here else 0))
        alive_weight.append((values != 0).any(0) * weight)
    total = GroupSums(steps)
    for part in sums.values():
        total.merge(part)
    whole = total.finish("all")
    groups = tuple(part.finish(name) for name, part in sums.items())
    alphas = usable_presets(betas[0], batch_size, dataset_size)
    shadows = run_shadow_gates(
        history.values, torch.cat(alive_weight), torch.cat(group), list(alphas.values()), betas
    )
    clipped = max(history.norms) * (1 - _CLIP_TOLERANCE)
    return GradientProbe(
        steps=steps,
        nonfinite=history.nonfinite,
        clipped=sum(norm >= clipped for norm in history.norms),
        sampled=total.sampled / total.parameters,
        betas=betas,
        batch_size=batch_size,
        dataset_size=dataset_size,
        total=whole,
        groups=groups,
        presets=tuple(
            judge_preset(name, alpha, betas[0], whole, groups, shadow)
            for (name, alpha), shadow in zip(alphas.items(), shadows, strict=True)
        ),
    )
