"""Puts together what a probe found, and turns it into plain values."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.probe.advice import advise
from poprisk_integrations.cli.probe.sizes import RunSizes
from poprisk_integrations.cli.probe.watch import StepWatch, WatchedOptimizer
from poprisk_integrations.diagnostics.gradient_probe import (
    SHORTEST_PROBE,
    GradientProbe,
    probe_gradients,
)
from poprisk_integrations.diagnostics.group_probe import GroupProbe
from poprisk_integrations.diagnostics.layer_groups import layer_groups
from poprisk_integrations.diagnostics.stop_outlook import StopOutlook, stop_outlook
from poprisk_integrations.optim._moments import MOMENTS, moment_format

__all__ = ["STATE_CHOICES", "OptimizerReport", "ProbeReport", "build_report", "state_bytes"]

# Label -> option `state_dtype` of PopRiskAdamW; bytes per parameter as in optim/README.md.
STATE_CHOICES: dict[str, Any] = {
    "float32 (12 B)": None,
    "bfloat16 noise (10 B)": {"exp_dev_sq": "bfloat16"},
    "bfloat16 (6 B)": "bfloat16",
    "8bit (3.2 B)": "8bit",
}
_FORMAT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1 + 4 / 64}
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerReport:
    """One optimizer of the run.

    Attributes:
        name: Its class.
        tensors: Trained tensors.
        parameters: Trained parameters.
        probe: Its gradients.
        stop: What the stop would see.
        memory: Bytes of the moments by choice of `STATE_CHOICES`, and of AdamW.
        advice: Two sentences.
        notes: What to know beside the numbers.
    """

    name: str
    tensors: int
    parameters: int
    probe: GradientProbe
    stop: StopOutlook
    memory: dict[str, int]
    advice: tuple[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeReport:
    """What a probe found.

    Attributes:
        source: What was probed.
        sizes: Of the run.
        optimizers: One or more.
        seconds_per_step: Mean time of a probed step.
        overhead: The probe's own share of it.
    """

    source: str
    sizes: RunSizes
    optimizers: tuple[OptimizerReport, ...]
    seconds_per_step: float
    overhead: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        plain: dict[str, Any] = _plain(
            {
                "source": self.source,
                "sizes": asdict(self.sizes),
                "seconds_per_step": self.seconds_per_step,
                "overhead": self.overhead,
                "optimizers": [_optimizer_json(report) for report in self.optimizers],
            }
        )
        return plain


def build_report(watch: StepWatch, sizes: RunSizes, source: str) -> ProbeReport:
    """Measure what the watch kept.

    Args:
        watch: After the run.
        sizes: Of the run.
        source: What was probed, for the title.

    Raises:
        UsageError: If nothing, or not enough, could be watched.
    """
    watched = [w for w in watch.watched if w.history is not None]
    _check(watch, watched)
    enough = [w for w in watched if _kept(w) >= SHORTEST_PROBE]
    steps = max(1, max(w.steps for w in enough) - 1)
    return ProbeReport(
        source=source,
        sizes=sizes,
        optimizers=tuple(_report_of(w, watch, sizes) for w in enough),
        seconds_per_step=watch.seconds / steps,
        overhead=watch.own_seconds / watch.seconds if watch.seconds else 0.0,
    )


def state_bytes(params: Sequence[Tensor]) -> dict[str, int]:
    """Bytes of the moments, for AdamW in float32 and each of `STATE_CHOICES`.

    Small tensors stay float32 where 8-bit codes would not pay.

    Args:
        params: The trained parameters.

    Example:
        >>> state_bytes([torch.zeros(10)])["float32 (12 B)"]
        120
    """
    result = {"AdamW (8 B)": sum(8 * p.numel() for p in params)}
    for label, choice in STATE_CHOICES.items():
        result[label] = round(
            sum(p.numel() * _bytes_of(moment_format(p, k, choice)) for p in params for k in MOMENTS)
        )
    return result


def _bytes_of(kind: str | torch.dtype) -> float:
    return float(kind.itemsize) if isinstance(kind, torch.dtype) else _FORMAT_BYTES[kind]


def _kept(watched: WatchedOptimizer) -> int:
    return 0 if watched.history is None else len(watched.history)


def _check(watch: StepWatch, watched: Sequence[WatchedOptimizer]) -> None:
    """Refuse a run of which nothing can be said."""
    if not watch.watched:
        raise UsageError("the training never stepped a torch optimizer")
    if not watched:
        raise UsageError("the optimizer has no trainable parameter")
    if any(_kept(w) >= SHORTEST_PROBE for w in watched):
        return
    histories = [w.history for w in watched if w.history is not None]
    if not any(any(h.present) for h in histories):
        if any(any(h.sparse) for h in histories):
            raise UsageError("all gradients are sparse: use sparse=False for embeddings")
        if any(h.nonfinite for h in histories):
            raise UsageError("every step had a non-finite gradient (inf or nan)")
        raise UsageError("no parameter had a gradient when the optimizer stepped")
    most = max(map(_kept, watched))
    raise UsageError(
        f"the training ended after {most} measured steps: a probe needs at least {SHORTEST_PROBE}"
    )


def _report_of(watched: WatchedOptimizer, watch: StepWatch, sizes: RunSizes) -> OptimizerReport:
    assert watched.history is not None
    group_of = layer_groups(watched.names)  # as the monitors name them
    probe = probe_gradients(
        watched.history,
        [group_of[name] for name in watched.names],
        betas=watched.betas or (0.9, 0.999),
        batch_size=sizes.batch_size,
        dataset_size=sizes.dataset_size,
    )
    stop = stop_outlook(sizes.total_steps, sizes.epoch_steps)
    name = type(watched.optimizer).__name__
    return OptimizerReport(
        name=name,
        tensors=len(watched.params),
        parameters=sum(p.numel() for p in watched.params),
        probe=probe,
        stop=stop,
        memory=state_bytes(watched.params),
        advice=advise(probe, stop, "AdamW" if watched.betas is not None else name),
        notes=tuple(_notes(watched, watch, sizes, probe)),
    )


def _notes(
    watched: WatchedOptimizer, watch: StepWatch, sizes: RunSizes, probe: GradientProbe
) -> list[str]:
    history = watched.history
    assert history is not None
    notes = []
    if watched.steps < watch.limit:
        notes.append(f"The training ended after {watched.steps} of {watch.limit} steps.")
    if probe.nonfinite:
        notes.append(f"{probe.nonfinite} steps with a non-finite gradient are left out.")
    if any(history.sparse):
        notes.append(f"{sum(history.sparse)} tensors with sparse gradients are left out.")
    absent = sum(not here for here in history.present) - sum(history.sparse)
    if absent > 0:
        notes.append(f"{absent} tensors never had a gradient.")
    if probe.clipped > 2:
        notes.append(
            f"{probe.clipped} of {probe.steps} gradients have the same norm: they were clipped, so "
            "the noise scale is of clipped gradients."
        )
    if sizes.epoch_steps is not None and probe.steps > sizes.epoch_steps:
        notes.append(
            f"The probe saw the data {probe.steps / sizes.epoch_steps:.1f} times: part of the "
            "signal is that of these very examples."
        )
    if watched.betas is None:
        notes.append(
            f"{type(watched.optimizer).__name__} has no betas: gates are judged under "
            f"PopRiskAdamW's defaults, {probe.betas}."
        )
    return notes


def _optimizer_json(report: OptimizerReport) -> dict[str, Any]:
    probe = report.probe
    return {
        "name": report.name,
        "tensors": report.tensors,
        "parameters": report.parameters,
        "steps": probe.steps,
        "nonfinite_steps": probe.nonfinite,
        "clipped_steps": probe.clipped if probe.clipped > 2 else 0,
        "sampled_share": probe.sampled,
        "betas": list(probe.betas),
        "noise_scale": {
            "unit": "examples" if probe.batch_size else "batches",
            "value": (probe.batch_size or 1) * probe.total.scale.batches,
            "standard_error": (probe.batch_size or 1) * probe.total.scale.batches_se,
            "interval": [(probe.batch_size or 1) * x for x in probe.total.scale.interval()],
            "gradient_norm_sq": probe.total.scale.signal,
            "trace_of_batch_covariance": probe.total.scale.noise,
        },
        "total": _group_json(probe.total),
        "groups": [_group_json(group) for group in probe.groups],
        "presets": [asdict(preset) for preset in probe.presets],
        "stop": asdict(report.stop),
        "memory_bytes": report.memory,
        "notes": list(report.notes),
        "advice": list(report.advice),
    }


def _group_json(group: GroupProbe) -> dict[str, Any]:
    snr = group.snr
    return {
        "name": group.name,
        "parameters": group.parameters,
        "dead_share": group.dead,
        "rms_snr": group.rms_snr,
        "mean_square_snr": group.rms_snr_sq,
        "mean_square_snr_se": group.rms_snr_sq_se,
        "snr_quantiles": {str(q): snr and snr.quantile(q) for q in QUANTILES},
        "share_above_0.5": snr and snr.share_above(0.5),
        "noise_scale_batches": group.scale.batches,
        "noise_scale_batches_se": group.scale.batches_se,
        "signal_ratio": group.signal_ratio,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
