"""What happened, in sentences and in a few figures."""

import math
from collections.abc import Sequence

import numpy as np

from poprisk_integrations.cli.flips.arguments import flips_command
from poprisk_integrations.cli.report.charts import RATES, matching
from poprisk_integrations.cli.report.cleaning import did_cleaning_help, what_was_made
from poprisk_integrations.cli.report.run import NOTHING, Run, Stop, finite, number, plain, shown
from poprisk_integrations.core.label_advice import LabelAdvice, label_advice

__all__ = ["answers", "headline", "key_figures", "label_lines", "sentences"]


def headline(run: Run) -> str:
    """How the run ended: one short sentence."""
    stop, last, planned = run.stop, run.last_step, run.planned_steps
    ends = f"the log ends at step {_steps(run)}"
    if stop is not None and stop.cooldown_step is not None:
        back, best = shown(stop.cooldown_step), shown(stop.best_step)
        return (
            f"Went back at step {back} to the weights of step {best} and let the learning rate go "
            f"to zero; {ends}."
        )
    if stop is not None and stop.stop_step is not None:
        step = shown(stop.stop_step)
        if not stop.stopped:
            return f"Would have stopped at step {step}, but only watched; {ends}."
        if stop.stop_step == planned:
            return f"Stopped at step {step}, which was the last one planned."
        return f"Stopped early at step {step}{'' if planned is None else f' of {planned}'}."
    if last is None and run.cleaning is not None:
        return what_was_made(run.cleaning)
    if last is None:
        return "No step was logged."
    if planned is not None and last >= planned:
        return f"Ran all {planned} planned steps."
    more = "" if planned is None else ": still running, interrupted, or ended by something else"
    return f"T{ends[1:]}{more}."


def answers(run: Run) -> dict[str, str]:
    """What a reader asks first."""
    stop, suspects = run.stop, run.suspects
    reason = "" if stop is None else stop.reason
    todo = [] if stop is None or stop.windows.empty else [_next(stop)]
    if suspects is not None:
        todo.append(f"of the labels: {_advice(run)}")
    if not todo:
        todo = ["the stop, added to the next run, draws its test loss without validation data"]
    helped = [] if run.cleaning is None else [did_cleaning_help(run)]
    if not helped or stop is not None:
        helped.append(_help(run))
    return {
        "Did it help?": " ".join(helped),
        "Why did it end?": f"{headline(run)} {reason[:1].upper()}{reason[1:]}{'.' * bool(reason)}",
        "What now?": " ".join(f"{text[:1].upper()}{text[1:]}." for text in todo),
    }


def _next(stop: Stop) -> str:
    """The advice of the diagnosis; a run that the stop has ended is not told to go on."""
    ended = stop.stopped or stop.cooldown_step is not None
    if ended and stop.diagnosis.kind in ("unclear", "learning"):
        more = "patience" if stop.criterion == "risk" else "kappa"
        return f"use the weights it ended with; a larger `{more}` lets such a run go on for longer"
    return stop.diagnosis.advice


def _help(run: Run) -> str:
    stop, curve = run.stop, finite(run.curve("poprisk/estimated_test_loss"))
    if stop is None or curve.empty or stop.best_step is None:
        return "This log cannot tell: it has no estimated test loss."
    errors = run.errors("poprisk/estimated_test_loss")
    low, last = curve.idxmin(), curve.index[-1]

    def told(at: float) -> str:
        return f"{shown(curve[at])} +- {shown(errors[at], 2)}"

    lowest = f"the estimated test loss was lowest at step {shown(stop.best_step)}, {told(low)}"
    if low == last:
        return f"There was nothing to save: {lowest}, the last window."
    rise = curve[last] - curve[low]
    is_clear = rise > 2 * math.hypot(errors[low], errors[last])
    ended = f"{lowest}, and {told(last)} in the last window"
    if stop.cooldown_step is not None or stop.best:
        return f"{'Yes' if is_clear else 'Hardly'}: {ended}; the weights of the lowest were kept."
    if is_clear:
        return f"It could have: {ended}; the weights of the lowest were not kept."
    return f"There was nothing to save: {ended}, which is within its error."


def sentences(run: Run) -> list[str]:
    """All that is worth saying before any chart."""
    made = [] if run.cleaning is None else [what_was_made(run.cleaning)]
    found = [*made, *_stop(run), *_losses(run), _gate(run)]
    if run.noise.get("diagnosis"):
        found.append(f"Labels: {plain(run.noise['diagnosis'])}.")
    elif _rate(run) != NOTHING:
        found.append(f"Estimated noise rate {_rate(run)}.")
    return [text for text in found if text] + [plain(note) for note in run.notes]


def _stop(run: Run) -> list[str]:
    stop = run.stop
    if stop is None and run.last_step is None and run.cleaning is not None:
        return []
    if stop is None:
        return ["No early-stopping callback of this package left a report."]
    found = [f"Early stopping: {stop.reason}." if stop.reason else ""]
    if not stop.windows.empty:
        said = str(stop.diagnosis)
        found.append(f"{said[:1].upper()}{said[1:]}. What to do: {stop.diagnosis.advice}.")
    if stop.best:
        name = stop.best.replace("\\", "/").rpartition("/")[2]
        found.append(f"Kept as the result: {name}.")
    return found


def _losses(run: Run) -> list[str]:
    found = []
    for key, curve in run.family("loss"):
        good, bad = finite(curve), curve[~np.isfinite(curve)]
        split = key.split.capitalize()
        if bad.size:
            found.append(f"{split} loss is not finite at step {shown(bad.index[0])}.")
        if len(good) < 2 or key.kind == "step":
            continue
        text = f"{split} loss went from {shown(good.iloc[0])} to {shown(good.iloc[-1])}"
        if key.split != "train":
            text += f"; its lowest was {shown(good.min())} at step {shown(good.idxmin())}"
        found.append(f"{text}.")
    return found


def _gate(run: Run) -> str:
    names = ("open_fraction", "closed_noise", "closed_zero_grad", "update_norm_ratio")
    share, noise, dead, ratio = (run.last(f"poprisk/{name}") for name in names)
    if share is None:
        return ""
    text = f"The gate was last open for {100 * share:.3g} % of the coordinates"
    if noise is not None and dead is not None:
        text += f", closed for {100 * noise:.3g} % as noise"
        text += f" and {100 * dead:.3g} % without a gradient"
    if ratio is not None:
        text += f"; gated updates had {shown(ratio, 3)} of the ungated norm"
    return f"{text}."


def _rate(run: Run) -> str:
    rate, low, high = (number(run.noise.get(name)) for name in ("rate", "low", "high"))
    if rate is None:
        return NOTHING
    interval = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f} %)"
    return f"{100 * rate:.0f} %{interval}"


def label_lines(run: Run) -> list[str]:
    """What is known of wrong labels; nothing where nothing is."""
    return [*_noise(run), *_suspect_lines(run)]


def _noise(run: Run) -> list[str]:
    names = ("rate", "low", "high", "num_pairs", "estimated_at_step", "rate_in_use")
    rate, low, high, pairs, step, used = (number(run.noise.get(name)) for name in names)
    if not run.noise:
        return []
    if rate is None and high is None:
        return ["The noise rate was not estimated."]
    interval = f"{100 * (low or 0.0):.1f} to {100 * (high or 0.0):.1f} %"
    if rate is None:
        text = f"The margins do not tell how many labels are wrong: {interval}"
    else:
        text = f"Estimated noise rate {100 * rate:.1f} %"
        text += "" if low is None or high is None else f", 95 % interval {interval}"
    text += "" if pairs is None else f", from {shown(pairs)} pairs"
    lines = [f"{text}." if step is None else f"{text}, at step {shown(step)}."]
    if run.noise.get("method"):
        lines.append(f"Method: {plain(run.noise['method'])}.")
    loss, text = run.noise.get("loss"), ""
    if used is not None and loss in ("cdpo", "rdpo", "weights"):
        text = f", with noise rate {shown(used)}"
        if rate is not None and used < rate:
            text += " (no larger one is used: too large a rate does more harm than too small)"
    return [*lines, f"Loss mode: {plain(loss)}{text}."] if loss else lines


def _suspect_lines(run: Run) -> list[str]:
    suspects = run.suspects
    if suspects is None:
        return []
    counts = ", ".join(f"{count} {action}" for action, count in suspects.actions.items())
    found = f"{suspects.num_pairs} pairs, {len(suspects.pairs)} of them judged"
    likely, pairs = suspects.likely, suspects.pairs
    if suspects.calibrated:
        expected = pairs["probability_wrong"].sum()
        judged = (
            f"{found}; {expected:.0f} wrong labels expected, {len(likely)} pairs more probably "
            "wrong than right."
        )
    else:
        judged = (
            f"{found}; they are ranked by their margins. How many are wrong is not known, so the "
            "column 'probability wrong' is a ranking and no probability."
        )
    lines = [judged, f"Suggested actions: {counts}.", f"What to do next: {_advice(run)}."]
    if suspects.num_swapped is not None:
        among = (
            f"; {likely['swapped'].sum()} of the {len(likely)} pairs that are more probably wrong "
            "than right are among them"
        )
        among = among if suspects.calibrated else ""
        lines.append(f"{suspects.num_swapped} labels were swapped on purpose{among}.")
    return lines


def _advice(run: Run) -> LabelAdvice:
    suspects = run.suspects
    assert suspects is not None
    pairs = suspects.pairs
    has_ids = bool((pairs["pair_id"] != pairs["row"]).any())
    return label_advice(
        num_judged=len(pairs),
        num_suspect=int(pairs["probability_wrong"].ge(0.5).sum()),
        calibrated=suspects.calibrated,
        command=suspects.command
        or flips_command(suspects.directory or run.directory, has_ids=has_ids),
        cleaned=run.cleaning is not None,
    )


def _steps(run: Run) -> str:
    planned = "" if run.planned_steps is None else f" of {run.planned_steps}"
    return f"{NOTHING if run.last_step is None else run.last_step}{planned}"


def _time(seconds: float | None) -> str:
    if seconds is None or not np.isfinite(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _figures(run: Run) -> dict[str, str]:
    def last(name: str, split: str = "train", digits: int = 4) -> str:
        return shown(run.last(name, split), digits)

    def estimate(name: str, *, lowest: bool = False) -> str:
        values = run.curve(f"poprisk/estimated_test_{name}")
        if values.empty or run.stop is None:
            return NOTHING
        at = values.idxmin() if lowest else values.index[-1]
        error = run.errors(f"poprisk/estimated_test_{name}")[at]
        step = f" at {shown(run.stop.best_step)}" if lowest else ""
        return f"{shown(values[at])} +- {shown(error, 2)}{step}"

    held_out = [finite(curve) for key, curve in run.family("loss") if key.split == "eval"]
    lowest = min(((c.min(), c.idxmin()) for c in held_out if c.size), default=None)
    rates = matching([run], RATES)
    return {
        "steps": _steps(run),
        "lowest estimated test loss": estimate("loss", lowest=True),
        "last estimated test loss": estimate("loss"),
        "last estimated test accuracy": estimate("accuracy"),
        "onset": shown(run.stop.onset_step if run.stop else None),
        "stop": shown(run.stop.stop_step if run.stop else None),
        "last F": last("poprisk/signal_ratio", digits=3),
        "train loss": last("loss"),
        "mean train loss": shown(run.totals.get("train_loss")),
        "eval loss": last("loss", "eval"),
        "lowest eval loss": NOTHING if lowest is None else " at ".join(map(shown, lowest)),
        "learning rate": last(rates[0]) if rates else NOTHING,
        "open fraction": last("poprisk/open_fraction", digits=3),
        "mean gate": last("poprisk/mean_gate", digits=3),
        "norm ratio": last("poprisk/update_norm_ratio", digits=3),
        "reward accuracy": last("poprisk/reward_accuracy", digits=3),
        "eval reward accuracy": last("poprisk/reward_accuracy", "eval", 3),
        "noise rate (95 %)": _rate(run),
        "suspected flips": NOTHING if run.suspects is None else str(len(run.suspects.likely)),
        "run time": _time(run.totals.get("train_runtime")),
    }


def key_figures(runs: Sequence[Run]) -> list[list[str]]:
    """Name, and a value for each run; names that no run has a value for are left out."""
    found = [_figures(run) for run in runs]
    rows = [[name, *(one[name] for one in found)] for name in found[0]]
    return [row for row in rows if {*row[1:]} != {NOTHING}]
