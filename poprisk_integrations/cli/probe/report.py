"""Puts together what a probe found, and turns it into plain values."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.probe.advice import advise
from poprisk_integrations.cli.probe.sources import RunSizes
from poprisk_integrations.cli.probe.watch import StepWatch, WatchedOptimizer
from poprisk_integrations.diagnostics.layer_sample import layer_groups
from poprisk_integrations.diagnostics.probe import (
    SHORTEST_PROBE,
    GradientHistory,
    GradientProbe,
    GroupProbe,
    probe_gradients,
)
from poprisk_integrations.diagnostics.run_length import StopOutlook, stop_outlook
from poprisk_integrations.optim._options import kept_moments
from poprisk_integrations.optim._states import moment_format

__all__ = ["OptimizerReport", "ProbeReport", "build_report"]

# Label -> `noise_source` and `state_dtype` of PopRiskAdamW; bytes as in optim/README.md.
STATE_CHOICES: dict[str, tuple[str, Any]] = {
    "float32 (8 B)": ("moments", None),
    "temporal noise (12 B)": ("temporal", None),
    "bfloat16 (4 B)": ("moments", "bfloat16"),
    "8bit (2.1 B)": ("moments", "8bit"),
}
_FORMAT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1 + 4 / 64}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerReport:
    """One optimizer of the run."""

    name: str  # of its class
    tensors: int  # that it trains
    parameters: int
    probe: GradientProbe
    stop: StopOutlook
    memory: dict[str, int]  # bytes of the moments by choice of `STATE_CHOICES`
    advice: tuple[str, str]
    notes: list[str]  # what to know beside the numbers

    def to_json(self) -> dict[str, Any]:
        """Plain values; also NaN and infinity."""
        probe, scale, unit = self.probe, self.probe.total.scale, self.probe.batch_size or 1
        return {
            "name": self.name,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "steps": probe.steps,
            "nonfinite_steps": probe.nonfinite,
            "clipped_steps": probe.clipped if probe.clipped > 2 else 0,
            "sampled_share": probe.sampled,
            "betas": list(probe.betas),
            "noise_scale": {
                "unit": "examples" if probe.batch_size else "batches",
                "value": unit * scale.batches,
                "standard_error": unit * scale.batches_se,
                "interval": [unit * x for x in scale.interval()],
                "gradient_norm_sq": scale.signal,
                "trace_of_batch_covariance": scale.noise,
            },
            "total": _group_json(probe.total),
            "groups": [_group_json(group) for group in probe.groups],
            "presets": [asdict(preset) for preset in probe.presets],
            "stop": asdict(self.stop),
            "memory_bytes": self.memory,
            "notes": self.notes,
            "advice": list(self.advice),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeReport:
    """What a probe of `source` found."""

    source: str
    sizes: RunSizes
    optimizers: tuple[OptimizerReport, ...]  # one or more
    seconds_per_step: float  # mean time of a probed step
    overhead: float  # the probe's own share of it

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        plain: dict[str, Any] = _finite(
            {
                "source": self.source,
                "sizes": asdict(self.sizes),
                "seconds_per_step": self.seconds_per_step,
                "overhead": self.overhead,
                "optimizers": [report.to_json() for report in self.optimizers],
            }
        )
        return plain


def build_report(watch: StepWatch, sizes: RunSizes, source: str) -> ProbeReport:
    """Measure what the watch kept; refuse a run of which nothing can be said."""
    histories = [w.history for w in watch.watched if w.history is not None]
    if max(map(len, histories), default=0) < SHORTEST_PROBE:
        raise UsageError(_why_nothing(watch, histories))
    reports, steps = [], 1
    for watched in watch.watched:
        if watched.history is not None and len(watched.history) >= SHORTEST_PROBE:
            reports.append(_report_of(watched, watched.history, watch.limit, sizes))
            steps = max(steps, watched.steps - 1)  # the clock starts at the end of the first
    return ProbeReport(
        source=source,
        sizes=sizes,
        optimizers=tuple(reports),
        seconds_per_step=watch.seconds / steps,
        overhead=watch.own_seconds / watch.seconds,
    )


def _why_nothing(watch: StepWatch, histories: Sequence[GradientHistory]) -> str:
    if not watch.watched:
        return "the training never stepped a torch optimizer"
    if not histories:
        return "the optimizer has no trainable parameter"
    if any(any(h.present) for h in histories):
        most = max(map(len, histories))
        return (
            f"the training ended after {most} measured steps: a probe needs at least "
            f"{SHORTEST_PROBE}"
        )
    if any(any(h.sparse) for h in histories):
        return "all gradients are sparse: use sparse=False for embeddings"
    if any(h.nonfinite for h in histories):
        return "every step had a non-finite gradient (inf or nan)"
    return "no parameter had a gradient when the optimizer stepped"


def state_bytes(params: Sequence[Tensor]) -> dict[str, int]:
    """Bytes of the moments, for each of `STATE_CHOICES`.

    Small tensors stay float32 where 8-bit codes would not pay.

    Example:
        >>> from torch import zeros
        >>> state_bytes([zeros(10)])["temporal noise (12 B)"]
        120
    """
    result = {}
    for label, (source, choice) in STATE_CHOICES.items():
        moments = kept_moments({"noise_source": source})
        size = 0.0
        for param in params:
            for kind in (moment_format(param, moment, choice) for moment in moments):
                each = _FORMAT_BYTES[kind] if isinstance(kind, str) else kind.itemsize
                size += param.numel() * each
        result[label] = round(size)
    return result


def _report_of(
    watched: WatchedOptimizer, history: GradientHistory, limit: int, sizes: RunSizes
) -> OptimizerReport:
    name = type(watched.optimizer).__name__
    group_of = layer_groups(watched.names)  # as the monitors name them
    probe = probe_gradients(
        history,
        [group_of[name] for name in watched.names],
        betas=watched.betas or (0.9, 0.999),
        batch_size=sizes.batch_size,
        dataset_size=sizes.dataset_size,
    )
    stop = stop_outlook(sizes.total_steps, sizes.epoch_steps)
    absent = sum(not here for here in history.present) - sum(history.sparse)
    passes = probe.steps / (sizes.epoch_steps or probe.steps)
    notes = {
        f"The training ended after {watched.steps} of {limit} steps.": watched.steps < limit,
        f"{probe.nonfinite} steps with a non-finite gradient are left out.": probe.nonfinite > 0,
        f"{sum(history.sparse)} tensors with sparse gradients are left out.": any(history.sparse),
        f"{absent} tensors never had a gradient.": absent > 0,
        f"{probe.clipped} of {probe.steps} gradients have the same norm: they were clipped, so "
        "the noise scale is of clipped gradients.": probe.clipped > 2,
        f"The probe saw the data {passes:.1f} times: part of the signal is that of these very "
        "examples.": passes > 1,
        f"{name} has no betas: gates are judged under PopRiskAdamW's defaults, "
        f"{probe.betas}.": watched.betas is None,
    }
    return OptimizerReport(
        name=name,
        tensors=len(watched.params),
        parameters=sum(p.numel() for p in watched.params),
        probe=probe,
        stop=stop,
        memory=state_bytes(watched.params),
        advice=advise(probe, stop, "AdamW" if watched.betas is not None else name),
        notes=[note for note, holds in notes.items() if holds],
    )


def _group_json(group: GroupProbe) -> dict[str, Any]:
    snr = group.snr
    return {
        "name": group.name,
        "parameters": group.parameters,
        "dead_share": group.dead,
        "rms_snr": group.rms_snr,
        "mean_square_snr": group.rms_snr_sq,
        "mean_square_snr_se": group.rms_snr_sq_se,
        "snr_quantiles": {str(q): snr and snr.quantile(q) for q in (0.5, 0.9, 0.99)},
        "share_above_0.5": snr and snr.share_above(0.5),
        "noise_scale_batches": group.scale.batches,
        "noise_scale_batches_se": group.scale.batches_se,
        "signal_ratio": group.signal_ratio,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
