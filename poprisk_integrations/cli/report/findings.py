"""What happened, in sentences and in a few figures."""

import math
from collections.abc import Sequence

from poprisk_integrations.cli.report.loss_charts import learning_rate_bases
from poprisk_integrations.cli.report.plain_text import NOTHING, number, plain, shown
from poprisk_integrations.cli.report.run import Run

__all__ = ["headline", "key_figures", "sentences"]


def headline(run: Run) -> str:
    """How the run ended: one short sentence."""
    planned = "" if run.planned_steps is None else f" of {run.planned_steps}"
    stop = run.stop
    if stop is not None and stop.stop_step is not None:
        if stop.stopped and stop.stop_step == run.planned_steps:
            return f"Stopped at step {shown(stop.stop_step)}, which was the last one planned."
        if stop.stopped:
            return f"Stopped early at step {shown(stop.stop_step)}{planned}."
        return (
            f"Would have stopped at step {shown(stop.stop_step)}, but only watched; the log ends "
            f"at step {_step(run)}{planned}."
        )
    if run.last_step is None:
        return "No step was logged."
    if run.planned_steps is not None and run.last_step >= run.planned_steps:
        return f"Ran all {run.planned_steps} planned steps."
    if run.planned_steps is not None:
        return (
            f"The log ends at step {run.last_step}{planned}: still running, interrupted, or ended "
            "by something else."
        )
    return f"The log ends at step {run.last_step}."


def sentences(run: Run) -> list[str]:
    """All that is worth saying before any chart."""
    found = [_stop(run), _diagnosis(run), _kept(run), *_losses(run), _gate(run), _noise(run)]
    return [text for text in found if text] + [plain(note) for note in run.notes]


def _step(run: Run) -> str:
    return NOTHING if run.last_step is None else str(run.last_step)


def _stop(run: Run) -> str:
    if run.stop is None:
        return "No early-stopping callback of this package left a report."
    return f"Early stopping: {run.stop.reason}." if run.stop.reason else ""


def _diagnosis(run: Run) -> str:
    if run.stop is None or not run.stop.history:
        return ""
    found = run.stop.diagnosis
    said = str(found)
    return f"{said[:1].upper()}{said[1:]}. What to do: {found.advice}."


def _kept(run: Run) -> str:
    if run.stop is None or not run.stop.best:
        return ""
    return f"Kept as the result: {run.stop.best.replace(chr(92), '/').rpartition('/')[2]}."


def _losses(run: Run) -> list[str]:
    found = []
    for key, curve in run.family("loss"):
        finite = curve.finite()
        bad = [s for s, v in zip(curve.steps, curve.values, strict=True) if not math.isfinite(v)]
        if bad:
            found.append(f"{key.split.capitalize()} loss is not finite at step {shown(bad[0])}.")
        if len(finite.values) < 2 or key.kind == "step":
            continue
        text = (
            f"{key.split.capitalize()} loss went from {shown(finite.values[0])} to "
            f"{shown(finite.values[-1])}"
        )
        if key.split != "train":
            lowest = min(finite.values)
            step = finite.steps[finite.values.index(lowest)]
            text += f"; its lowest was {shown(lowest)} at step {shown(step)}"
        found.append(f"{text}.")
    return found


def _gate(run: Run) -> str:
    open_fraction = run.last("poprisk/open_fraction")
    if open_fraction is None:
        return ""
    text = f"The gate was last open for {_percent(open_fraction)} of the coordinates"
    noise = run.last("poprisk/closed_noise")
    dead = run.last("poprisk/closed_zero_grad")
    if noise is not None and dead is not None:
        text += f", closed for {_percent(noise)} as noise and {_percent(dead)} without a gradient"
    ratio = run.last("poprisk/update_norm_ratio")
    if ratio is not None:
        text += f"; gated updates had {shown(ratio, 3)} of the ungated norm"
    return f"{text}."


def _noise(run: Run) -> str:
    noise = run.noise
    if noise is None:
        return ""
    parts = [f"Labels: {plain(noise['diagnosis'])}" if noise.get("diagnosis") else ""]
    rate = _rate(run)
    if not parts[0] and rate != NOTHING:
        parts = [f"Estimated noise rate {rate}"]
    return f"{parts[0]}." if parts[0] else ""


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _rate(run: Run) -> str:
    """Noise rate with its interval."""
    noise = run.noise or {}
    rate = number(noise.get("rate"))
    if rate is None:
        return NOTHING
    low, high = number(noise.get("low")), number(noise.get("high"))
    interval = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f} %)"
    return f"{100 * rate:.0f} %{interval}"


def key_figures(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Name, and a value for each run; names that no run has a value for are left out."""
    rates = learning_rate_bases(runs)
    rows: list[tuple[str, list[str]]] = [
        ("steps", [_steps(run) for run in runs]),
        ("onset", [shown(run.stop.onset_step) if run.stop else NOTHING for run in runs]),
        ("stop", [shown(run.stop.stop_step) if run.stop else NOTHING for run in runs]),
        ("last F", [_last_ratio(run) for run in runs]),
        ("train loss", [shown(run.last("loss")) for run in runs]),
        ("mean train loss", [shown(run.totals.get("train_loss")) for run in runs]),
        ("eval loss", [shown(run.last("loss", "eval")) for run in runs]),
        ("lowest eval loss", [_lowest(run) for run in runs]),
        ("learning rate", [shown(run.last(rates[0]) if rates else None) for run in runs]),
    ]
    for base, name in (
        ("open_fraction", "open fraction"),
        ("mean_gate", "mean gate"),
        ("update_norm_ratio", "norm ratio"),
        ("reward_accuracy", "reward accuracy"),
    ):
        rows.append((name, [shown(run.last(f"poprisk/{base}"), 3) for run in runs]))
    rows += [
        ("eval reward accuracy", [_eval_accuracy(run) for run in runs]),
        ("noise rate (95 %)", [_rate(run) for run in runs]),
        ("suspected flips", [str(r.suspects.num_likely) if r.suspects else NOTHING for r in runs]),
        ("run time", [_time(run.totals.get("train_runtime")) for run in runs]),
    ]
    return [(name, values) for name, values in rows if any(value != NOTHING for value in values)]


def _steps(run: Run) -> str:
    planned = "" if run.planned_steps is None else f" of {run.planned_steps}"
    return f"{_step(run)}{planned}"


def _last_ratio(run: Run) -> str:
    rows = run.stop.history if run.stop is not None else []
    values = [v for v in (number(row.get("signal_ratio")) for row in rows) if v is not None]
    return shown(values[-1] if values else run.last("poprisk/signal_ratio"), 3)


def _lowest(run: Run) -> str:
    curves = [c.finite() for k, c in run.family("loss") if k.split == "eval"]
    points = [pair for c in curves for pair in zip(c.values, c.steps, strict=True)]
    if not points:
        return NOTHING
    value, step = min(points)
    return f"{shown(value)} at {shown(step)}"


def _eval_accuracy(run: Run) -> str:
    return shown(run.last("poprisk/reward_accuracy", "eval"), 3)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
