"""Two sentences of advice: one on the gate, one on the stop."""

import math

from poprisk_integrations.core import Diagnosis, diagnose
from poprisk_integrations.core.sit_out_schedule import smallest_pool
from poprisk_integrations.diagnostics.probe import DEFAULT_PRESET, STRICT_PRESET, GradientProbe
from poprisk_integrations.diagnostics.run_length import StopOutlook

__all__ = ["advise", "noise_scale_text"]

_MOSTLY_OPEN = 0.9
_SHARE = 0.15  # of the examples, which the stop has join late
_FEW = 30  # examples that measure the test loss in the last pass


def advise(probe: GradientProbe, stop: StopOutlook, optimizer: str = "AdamW") -> tuple[str, str]:
    """What to do, as a function of the numbers alone; `optimizer` where no gate is advised.

    On the gate: none where no signal was found, where nearly all coordinates would pass it, or
    where less than half of the signal would; else as a choice beside a tuned AdamW, which no
    benchmark of this package has seen it beat.
    """
    can_stop = stop.verdict not in ("unknown", "single_pass")
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

    def steps_of(ratio: float) -> str:
        return "" if math.isnan(ratio) else f", with steps {ratio:.2f} times as long as Adam's"

    also = f"would keep no more than {_percent(strict.signal_kept)} of it"
    if strict.verdict == "selective":
        length = steps_of(strict.measured.update_norm_ratio)
        also = f"keeps {_percent(strict.signal_kept)}{length}"
    return (
        f"The default gate of PopRiskAdamW would keep {_percent(default.signal_kept)} of the "
        f"signal and shut out {_percent(1 - default.noise_open)} of pure noise"
        f"{steps_of(default.measured.update_norm_ratio)} (false_open_rate=0.05 {also}): worth a "
        f"run where labels may be wrong or the learning rate is not tuned, while a well-tuned "
        f"{plain} should do as well."
    )


def _on_stop(probe: GradientProbe, stop: StopOutlook) -> str:
    if stop.verdict == "unknown" or stop.epoch_steps is None:
        return (
            "Whether the stop can work depends on the length of an epoch: give --batch-size and "
            "--dataset-size, and --total-steps."
        )
    if stop.verdict == "single_pass":
        return (
            f"The stop will not act: the run's {stop.total_steps} steps are at most one pass over "
            "the data, in which the training loss before each step is the test loss."
        )
    passes = None if stop.total_steps is None else stop.total_steps / stop.epoch_steps
    when = "once per pass" if passes is None else f"once in each of {passes:.3g} passes"
    examples = probe.dataset_size or stop.epoch_steps * (probe.batch_size or 0)
    few = ""
    if examples and passes is not None:
        last = smallest_pool(examples, share=_SHARE, epochs=passes)
        band = ", so with a wide band" if last < _FEW else ""
        few = f", in the last from {last:.0f} of the {examples:,} examples{band}"
    return (
        "Where the loader tells which example is which, the stop can estimate the test loss "
        f"without validation data, {when} over the data{few}. In the probed steps: "
        f"{_finding(probe, stop)}."
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


def _percent(share: float) -> str:
    value = 100 * share
    if 0 < value < 1:
        return f"{value:.1g} %"
    return f"{value:.1f} %" if 99 < value < 100 else f"{value:.0f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
