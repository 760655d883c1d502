"""Rules on recorded runs: which weights of which run does an arm keep?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from benchmarks.ordinary_use.estimators import Curve, shipped
from benchmarks.ordinary_use.recorders import LIVE
from benchmarks.ordinary_use.runs import Runs, best_with_patience, row_at
from benchmarks.ordinary_use.training import COOLDOWN, PATIENCE

from poprisk_integrations.core import StoppingRule

__all__ = [
    "CANDIDATES",
    "DEFAULT",
    "METRICS",
    "Kept",
    "basic_rules",
    "cooled",
    "live_kept",
    "live_rules",
    "values_of",
]

METRICS = ("clean_accuracy", "clean_loss", "noisy_accuracy", "noisy_loss")
DEFAULT = "sit out, as shipped: cooldown"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a rule keeps."""

    arm: str  # the run that it comes from
    row: float  # of that run's evaluations (between two of them: interpolated), or of its cooldowns
    # "" for the last weights, "average", "cool" or (longer) "long"; "live_best", "live_cool" or
    # (shorter) "live_short": what the package's own rule, which ran beside the training, has kept.
    of: str = ""
    epochs: float  # passes that had to be trained, of all trainings together


def values_of(runs: Runs, kept: Kept) -> dict[str, float]:
    """The metrics of what is kept."""
    trace, prefix = runs[kept.arm], f"{kept.of}_" if kept.of else ""
    found = {}
    for name in METRICS:
        column = trace[prefix + name]
        found[name] = float(np.interp(kept.row, np.arange(len(column)), column))
    return found


def cooled(runs: Runs, arm: str, epoch: float) -> Kept:
    """A cooldown from about there: of those that were tried, the nearest in proportion."""
    tried = runs[arm]["cool_from"]
    row = int(np.abs(np.log(tried / max(epoch, 0.25))).argmin())
    return Kept(arm=arm, row=row, of="cool", epochs=1.25 * float(tried[row]))


def basic_rules(runs: Runs) -> Iterator[tuple[str, Kept]]:
    """Everything but the candidates."""
    full, last = runs["full"], len(runs["full"]["at"]) - 1
    planned = float(runs.condition.epochs)
    yield "train to the end", Kept(arm="full", row=last, epochs=planned)
    yield "train to the end, average", Kept(arm="full", row=last, of="average", epochs=planned)
    sit = runs["sit"]
    sit_last = len(sit["at"]) - 1
    yield "sit out, to the end", Kept(arm="sit", row=sit_last, epochs=planned)
    yield (
        "sit out, to the end, average",
        Kept(arm="sit", row=sit_last, of="average", epochs=planned),
    )
    for share in (10, 20):
        if runs.get(f"hold{share}") is not None:
            yield from _hold_out_rules(runs, share)
    stop, end = _signal_stop(runs), Kept(arm="full", row=last, epochs=planned)
    stopped = Kept(arm="full", row=row_at(full, stop), epochs=stop)
    decays = runs.condition.schedule not in ("constant", "plateau")
    yield "signal", stopped
    yield "signal + cooldown", cooled(runs, "full", stop) if stop < planned else end
    yield "signal, schedules finished", end if decays else stopped
    yield (
        "signal, schedules finished + cooldown",
        cooled(runs, "full", stop) if stop < planned and not decays else end,
    )
    for name, column, sign in (
        ("oracle of clean accuracy", "clean_accuracy", -1),
        ("oracle of clean loss", "clean_loss", 1),
        ("oracle of noisy loss", "noisy_loss", 1),
    ):
        values = sign * full[column]
        if np.isfinite(values).all():
            yield name, Kept(arm="full", row=int(values.argmin()), epochs=planned)


def _hold_out_rules(runs: Runs, share: int) -> Iterator[tuple[str, Kept]]:
    """By loss, by accuracy, over the whole run, with a refit, with a cooldown."""
    arm, planned = f"hold{share}", float(runs.condition.epochs)
    trace, name = runs[arm], f"hold-out {share} %"
    at = trace["at"]
    per_epoch = round((len(at) - 1) / planned)
    patience = PATIENCE * per_epoch

    def ended(row: int) -> float:
        return min(planned, float(at[row]) + PATIENCE)

    best = best_with_patience(trace["held_loss"], patience)
    yield name, Kept(arm=arm, row=best, epochs=ended(best))
    if np.isfinite(trace["held_accuracy"]).all():
        row = best_with_patience(-trace["held_accuracy"], patience)
        yield f"{name}, by accuracy", Kept(arm=arm, row=row, epochs=ended(row))
    row = 1 + int(trace["held_loss"][1:].argmin())
    yield f"{name}, best of the whole run", Kept(arm=arm, row=row, epochs=planned)
    averaged = trace["average_held_loss"]
    rows = np.array([0, *np.flatnonzero(np.isfinite(averaged))])  # the untrained first
    mean = best_with_patience(averaged[rows], PATIENCE)
    if averaged[rows][mean] < trace["held_loss"][best]:
        row = int(rows[mean])
        yield (
            f"{name}, best of last and average",
            Kept(arm=arm, row=row, of="average", epochs=ended(row)),
        )
    else:
        yield f"{name}, best of last and average", Kept(arm=arm, row=best, epochs=ended(best))
    # A refit and a cooldown start from the end of an epoch.
    whole = np.flatnonzero(at == at.round())
    epoch = float(at[whole][best_with_patience(trace["held_loss"][whole], PATIENCE)])
    spent = min(planned, epoch + PATIENCE)
    cut = Kept(arm="full", row=row_at(runs["full"], epoch), epochs=spent + epoch)
    refit = runs.get(f"refit{share}")
    if refit is None:
        yield f"{name}, refit", cut
    else:
        yield (
            f"{name}, refit",
            Kept(arm=f"refit{share}", row=len(refit["at"]) - 1, epochs=spent + epoch),
        )
    yield f"{name}, refit, cut", cut
    tail = LIVE["as shipped"].tail
    for of, said, share in (("cool", "", COOLDOWN), ("long", f" of {tail:g}", tail)):
        if f"{of}_clean_loss" in trace:
            epochs = spent + max(share * epoch, 1.0)
            yield f"{name}, cooldown{said}", Kept(arm=arm, row=0, of=of, epochs=epochs)


def live_rules(runs: Runs) -> Iterator[tuple[str, Kept]]:
    """The package's rule and its variants, as they ran beside the training."""
    for name in LIVE:
        yield f"sit out, {name}: best", live_kept(runs, name, False)
        yield f"sit out, {name}: cooldown", live_kept(runs, name, True)
    kept = live_kept(runs, "as shipped", True, "live_short")
    yield "sit out, as shipped: cooldown of a quarter", kept


def live_kept(runs: Runs, name: str, cool: bool, of: str = "live_cool") -> Kept:
    """What a rule that ran beside the training keeps: at its stop, or at the planned end."""
    sit, planned = runs["sit"], float(runs.condition.epochs)
    rule = list(LIVE).index(name)
    stop = float(sit["live_stop"][rule]) / int(sit["epoch_steps"])
    row = 0 if of == "live_short" else int(sit["live_row"][rule])
    best = Kept(arm="sit", row=int(sit["live_row"][rule]), of="live_best", epochs=planned)
    if stop < planned:
        share = COOLDOWN if of == "live_short" else LIVE[name].tail
        tail = max(share * float(sit["live_from"][rule]), 1.0)
        return (
            replace(best, row=row, of=of, epochs=stop + tail)
            if cool
            else replace(best, epochs=stop)
        )
    if bool(sit["live_keeps_best"][rule]):
        return best
    return Kept(arm="sit", row=len(sit["at"]) - 1, epochs=planned)


def _signal_stop(runs: Runs) -> float:
    """Epochs until the shipped rule stops; the planned ones if it does not."""
    full = runs["full"]
    per_epoch, rates = int(full["epoch_steps"]), full["rates"]
    windows = {int(step): row for row, step in enumerate(full["signal_step"])}
    rule, began = StoppingRule(), 0
    for step, lr in enumerate(rates, start=1):
        measured = {}
        if step in windows:
            row = windows[step]
            ratio, error, noise = (
                float(full[f"signal_{name}"][row]) for name in ("ratio", "ratio_se", "noise")
            )
            measured = {"ratio": ratio, "ratio_se": error, "noise": noise}
        decision = rule.update(step=step, lr=float(lr), reused=began >= per_epoch, **measured)
        if measured:
            began = step
        if decision.stop:
            return step / per_epoch
    return float(runs.condition.epochs)


def lowest(runs: Runs, patience: float = PATIENCE) -> tuple[Curve, int, int]:
    """The window of the lowest estimate before so many epochs without a lower one, and the last."""
    curve = runs.once(shipped)
    best, value, row = 0, np.inf, 0
    for row, found in enumerate(curve.value):
        if found < value:
            best, value = row, found
        elif curve.end[row] - curve.end[best] >= patience:
            break
    return curve, best, row


def keep_lowest(runs: Runs, patience: float = PATIENCE) -> Kept:
    """The weights at the end of that window, however sure the minimum is."""
    curve, best, last = lowest(runs, patience)
    return Kept(arm="sit", row=row_at(runs["sit"], curve.end[best]), epochs=float(curve.end[last]))


def cool_lowest(runs: Runs) -> Kept:
    """Cool down on all data from there; at the planned end nothing is left to cool."""
    curve, best, last = lowest(runs)
    if curve.end[best] >= runs.condition.epochs:
        return keep_lowest(runs)
    kept = cooled(runs, "sit", curve.end[best])
    return Kept(arm="sit", row=kept.row, of="cool", epochs=float(curve.end[last] + kept.epochs / 5))


def cool_at_stop(runs: Runs, patience: float) -> Kept:
    """Cool down where the patience ran out, from the weights of that moment."""
    curve, _, last = lowest(runs, patience)
    planned = float(runs.condition.epochs)
    if curve.end[last] >= planned:
        return Kept(arm="sit", row=len(runs["sit"]["at"]) - 1, epochs=planned)
    return cooled(runs, "sit", curve.end[last])


def better_average(runs: Runs) -> Kept:
    """As shipped; where that is the end, the average if it was better on those who sat last."""
    kept, sit = live_kept(runs, "as shipped", True), runs["sit"]
    if kept.of or kept.row < len(sit["at"]) - 1:
        return kept
    change = sit["end_average_losses"] - sit["end_losses"]
    known = np.flatnonzero(np.isfinite(change).any(1))
    if not known.size or np.nanmean(change[known[-1]]) >= 0:
        return kept
    return Kept(arm="sit", row=kept.row, of="average", epochs=kept.epochs)


# What to keep of a run in which examples sit out, by its training losses alone: a candidate may
# look at the run "sit" and its schedule, at nothing that was measured on test or held-out data.
# One row each in the table, as "sit out: NAME".
CANDIDATES: dict[str, Callable[[Runs], Kept]] = {
    "lowest, patience 10": keep_lowest,
    "lowest of the whole run": partial(keep_lowest, patience=np.inf),
    "lowest, patience 10, cooldown": cool_lowest,
    "patience 2, cooldown from there": partial(cool_at_stop, patience=2),
    "patience 5, cooldown from there": partial(cool_at_stop, patience=5),
    "as shipped, or the average at the end": better_average,
}
