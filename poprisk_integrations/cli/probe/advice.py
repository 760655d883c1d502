"""Two sentences of advice: one on the gate, one on the stop."""

import math

from poprisk_integrations.core import Diagnosis, diagnose
from poprisk_integrations.diagnostics.gradient_probe import GradientProbe
from poprisk_integrations.diagnostics.preset_probe import (
    DEFAULT_PRESET,
    STRICT_PRESET,
    PresetProbe,
)
from poprisk_integrations.diagnostics.stop_outlook import StopOutlook

__all__ = ["advise", "noise_scale_text"]

_MOSTLY_OPEN = 0.9


def advise(probe: GradientProbe, stop: StopOutlook, optimizer: str = "AdamW") -> tuple[str, str]:
    """What to do, as a function of the numbers alone.

    On the gate: none where no signal was found, where nearly all coordinates would pass it, or
    where less than half of the signal would; else as a choice beside a tuned AdamW, which no
    benchmark of this package has seen it beat.

    Args:
        probe: The gradients.
        stop: The run's length.
        optimizer: What to take where no gate is advised.

    Returns:
        Two sentences.
    """
    can_stop = stop.verdict in ("works", "coarse")
    plain = f"plain {optimizer}" + (" with the stop" if can_stop else "")
    return _on_gate(probe, plain), _on_stop(probe, stop)


def noise_scale_text(probe: GradientProbe) -> str:
    """The noise scale with its error, in examples if the batch size is known.

    Without a significant signal only a lower bound is known.
    """
    unit = probe.batch_size or 1
    name = "examples" if probe.batch_size else "batches"
    scale = probe.total.scale
    if not scale.is_significant():
        low = scale.interval()[0]
        return f"above {_count(unit * low)} {name}" if math.isfinite(low) else "not measurable"
    if scale.noise <= 0 or scale.batches == 0:
        return f"0 {name}"
    return f"{_count(unit * scale.batches)} +- {_count(unit * scale.batches_se)} {name}"


def _on_gate(probe: GradientProbe, plain: str) -> str:
    strict, default = probe.preset(STRICT_PRESET), probe.preset(DEFAULT_PRESET)
    total = probe.total
    if not total.has_signal():
        return (
            f"In {probe.steps} steps the batches agree no more than noise would (noise scale "
            f"{noise_scale_text(probe)}), so no gate can tell signal from noise at this batch "
            f"size: take {plain}, and probe longer or with larger batches if you doubt it."
        )
    if default.expected_open >= _MOSTLY_OPEN:
        return (
            f"{_percent(default.expected_open)} of the coordinates pass the default gate anyway "
            f"(rms SNR {total.rms_snr:.2g} per batch), so it would change little: take {plain}."
        )
    if default.verdict != "selective":
        return (
            f"There is signal, but too weak in each coordinate (rms SNR {total.rms_snr:.2g} per "
            f"batch): the calibrated gates would keep {_percent(default.signal_kept)} (default) "
            f"and {_percent(strict.signal_kept)} (false_open_rate=0.05) of it and mostly slow the "
            f"training down, so take {plain}."
        )
    also = (
        f"false_open_rate=0.05 keeps {_percent(strict.signal_kept)}{_step_length(strict)}"
        if strict.verdict == "selective"
        else f"false_open_rate=0.05 would lose most of it (keeps {_percent(strict.signal_kept)})"
    )
    return (
        f"The default gate of PopRiskAdamW would keep {_percent(default.signal_kept)} of the "
        f"signal and shut out {_percent(1 - default.noise_open)} of pure noise"
        f"{_step_length(default)} ({also}): worth a run where labels may be wrong or the learning "
        f"rate is not tuned, while a well-tuned {plain} should do as well."
    )


def _on_stop(probe: GradientProbe, stop: StopOutlook) -> str:
    if stop.verdict == "unknown":
        return (
            "Whether the stop can work depends on the length of an epoch: give --batch-size and "
            "--dataset-size, and --total-steps."
        )
    if stop.verdict == "full_batch":
        return (
            "The stop cannot work: each step takes the whole data set, so there is no noise of "
            "batches to compare the gradient with."
        )
    if stop.verdict == "single_pass":
        return (
            f"The stop will not act: the run's {stop.total_steps} steps are at most one pass over "
            "the data, in which no example can be memorised."
        )
    if stop.verdict == "too_short":
        return (
            f"The stop cannot act: its first window of {stop.window} steps on data seen before "
            f"would end at step {stop.first_step}, the run at {stop.total_steps}."
        )
    fit = (
        f"the run has {stop.windows} windows of {stop.window} steps"
        if stop.windows is not None
        else f"in a run of more than {stop.first_step} steps, with windows of {stop.window}"
    )
    can = "The stop can work" if stop.verdict == "works" else "The stop can work, if coarsely"
    few = "" if stop.verdict == "works" else f", at {stop.epoch_steps} batches per epoch"
    return (
        f"{can}{few}: {fit}, and it may act from step {stop.first_step} on, once batches agree no "
        f"more than chance explains; in the probed steps: {_finding(probe, stop)}."
    )


def _finding(probe: GradientProbe, stop: StopOutlook) -> Diagnosis:
    """The probed steps as one window.

    Each coordinate in units of its own noise, E F = 1 + steps * SNR^2, which has the error of the
    mean square SNR.
    """
    # As in a window: a sum over several passes averages the noise of one pass only.
    passes = max(1.0, probe.steps / (stop.epoch_steps or probe.steps))
    row = {
        "step": probe.steps,
        "signal_ratio": probe.total.signal_ratio / passes,
        "signal_ratio_se": probe.steps * probe.total.rms_snr_sq_se / passes,
        "reused": passes > 1.0,
    }
    return diagnose([row])


def _step_length(preset: PresetProbe) -> str:
    ratio = preset.measured.update_norm_ratio
    return "" if math.isnan(ratio) else f", with steps {ratio:.2f} times as long as Adam's"


def _percent(share: float) -> str:
    value = 100 * share
    if 0 < value < 1:
        return f"{value:.1g} %"
    return f"{value:.1f} %" if 99 < value < 100 else f"{value:.0f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
