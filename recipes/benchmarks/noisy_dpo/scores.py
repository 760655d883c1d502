"""The tables: everything is computed from the results file alone.

A setting is one condition, beta and schedule. Learning rates and epochs are chosen on the selection
seeds; what is reported is measured on the fresh seeds, or on the selection seeds where there are no
fresh ones, and then the line says "selection only".
"""

import math
from collections.abc import Iterator

import numpy as np
from grid import LRS
from matched import CLEAN_FITS, KL_GRID, area, fewest_flips, frontier, with_common_rates
from rows import METRICS
from runs import Point, Run, reported, tuned

__all__ = ["AGAINST", "BASELINE", "DEFAULT_LR", "ROBUST", "interval", "lines_of"]

BASELINE = "A1"
AGAINST = ("A1", "C1", "C3")  # in reward at matched KL
MARGINS_OF = ("A1", "A9")  # until the end of the first epoch other losses wait for the estimate
DEFAULT_LR = 3e-4
ROBUST = tuple(lr for lr in LRS if lr <= 1e-3)  # a factor of 33
KL_SHOWN = (1.0, 3.0, 10.0)
COLUMNS = (
    *("table", "condition", "beta", "schedule", "arm", "at", "lrs", "seeds", "n"),
    *METRICS,
    *("against", "measure", "difference", "low", "high", "reward difference", "reward low"),
    *("reward high", "kl difference", "noise_rate", "e_hat", "e_hat error", "largest error"),
    *("covered", "auc", "auc_late", "best accuracy"),
)
# Quantile 0.975 of Student's t, by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}

Arms = dict[str, list[Run]]


def lines_of(runs: list[Run]) -> list[dict]:
    """All tables, one line for each entry, with the same columns."""
    lines = []
    for setting in dict.fromkeys(run.setting for run in runs):
        arms: Arms = {}
        for run in runs:
            if run.setting == setting:
                arms.setdefault(run.arm, []).append(run)
        known = dict(zip(("condition", "beta", "schedule"), setting, strict=True))
        for table in (_tuned, _default, _robust, _matched_kl, _equal_fit, _noise):
            for line in table(arms):
                lines.append({name: {**known, **line}.get(name, "") for name in COLUMNS})
    return lines


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t interval over seeds; the interval is NaN for one seed.

    With five seeds t is 2.78, not 1.96.
    """
    n = len(differences)
    mean = float(np.mean(differences))
    if n < 2:
        return mean, math.nan, math.nan
    half = T_QUANTILE[n - 1] * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def _tuned(arms: Arms) -> Iterator[dict]:
    """Learning rate and epoch chosen by clean accuracy, then by the reward of samples."""
    for table, metric in (("tuned", "accuracy"), ("tuned by reward", "reward")):
        rival = tuned(arms.get(BASELINE, []), metric)
        for runs in arms.values():
            point = tuned(runs, metric)
            if point is not None:
                yield {"table": table, **_against(point, rival)}


def _default(arms: Arms) -> Iterator[dict]:
    rival = tuned(arms.get(BASELINE, []), "accuracy")
    for runs in arms.values():
        for point in [p for run in runs if run.lr == DEFAULT_LR for p in run.ends]:
            yield {"table": "default", **_against(point, rival)}


def _robust(arms: Arms) -> Iterator[dict]:
    """Mean and worst over the grid of learning rates, at the last epoch and at each stop."""
    rival = tuned(arms.get(BASELINE, []), "accuracy")
    for runs in arms.values() if rival is not None else ():
        ends = [point for run in runs if run.lr in ROBUST for point in run.ends]
        for end in dict.fromkeys(point.end for point in ends):
            points = [point for point in ends if point.end == end]
            yield from _over_rates(points, rival)


def _over_rates(points: list[Point], rival: Point | None) -> Iterator[dict]:
    assert rival is not None
    seeds, word = reported([*points, rival])
    gaps = np.stack([p.of("accuracy", seeds) - rival.of("accuracy", seeds) for p in points])
    rewards = np.stack([p.of("reward", seeds) - rival.of("reward", seeds) for p in points])
    means = {metric: np.array([p.mean(metric, seeds) for p in points]) for metric in METRICS}
    worst = int(gaps.mean(1).argmin())
    shared = {
        "arm": _arm(points[0]),
        "lrs": f"{len(points)} of {len(ROBUST)}",
        "seeds": word,
        "n": len(seeds),
        "against": f"{BASELINE}, {rival}",
        "measure": "accuracy",
    }
    yield {
        "table": "robust, mean",
        "at": points[0].end,
        **shared,
        **{metric: _round(float(value.mean())) for metric, value in means.items()},
        **_difference(gaps.mean(0)),
        **_difference(rewards.mean(0), "reward "),
        "kl difference": _round(float(means["kl"].mean()) - rival.mean("kl", seeds)),
    }
    yield {
        "table": "robust, worst",  # KL: the largest, wherever that is
        "at": f"{points[0].end}, worst at lr {points[worst].lr:g}",
        **shared,
        **{metric: _round(float(value[worst])) for metric, value in means.items()},
        "kl": _round(float(means["kl"].max())),
        **_difference(gaps[worst]),
        **_difference(rewards[worst], "reward "),
        "kl difference": _round(float(means["kl"].max()) - rival.mean("kl", seeds)),
    }


def _matched_kl(arms: Arms) -> Iterator[dict]:
    """Frontier of each arm against those of the rivals, at learning rates that both have."""
    for arm, runs in arms.items():
        for name in AGAINST:
            own, other = with_common_rates(runs, arms.get(name, []))
            if own and (name != arm or name == BASELINE):
                yield from _two_frontiers(own, other)


def _two_frontiers(own: list[Run], other: list[Run]) -> Iterator[dict]:
    mine, theirs = frontier(own), frontier(other)
    seeds, word = reported([Point(run) for run in (*own, *other)])
    shared = {
        "table": "matched KL",
        "arm": own[0].arm,
        "lrs": str(len(own)),
        "seeds": word,
        "n": len(seeds),
        "against": other[0].arm,
        "measure": "reward",
    }
    for k in KL_SHOWN:
        a, b = (points[KL_GRID.index(k)] for points in (mine, theirs))
        yield {
            **shared,
            "at": f"KL <= {k:g}: {a}",
            **_means(a, seeds),
            **_difference(a.of("reward", seeds) - b.of("reward", seeds)),
            "kl difference": _round(a.mean("kl", seeds) - b.mean("kl", seeds)),
        }
    areas = area(mine, seeds), area(theirs, seeds)
    yield {
        **shared,
        "at": "area",
        "reward": _round(float(areas[0].mean())),
        **_difference(areas[0] - areas[1]),
    }


def _equal_fit(arms: Arms) -> Iterator[dict]:
    """Wrong labels fitted where a share of the right ones is, against the baseline."""
    for runs in arms.values():
        own, other = with_common_rates(runs, arms.get(BASELINE, []))
        for level in CLEAN_FITS:
            point, rival = fewest_flips(own, level), fewest_flips(other, level)
            if point is not None:
                line = _against(point, rival, "flipped_fitted")
                at = f"{100 * level:.0f} %: {line['at']}"
                yield {"table": "equal clean fit", **line, "at": at, "lrs": str(len(own))}


def _noise(arms: Arms) -> Iterator[dict]:
    """What the margins of the first epoch tell; over all seeds, since nothing is chosen."""
    for run in (run for arm in MARGINS_OF for run in arms.get(arm, [])):
        single = {name: np.array(list(values.values())) for name, values in run.single.items()}
        rate, error = single["noise_rate"], np.abs(single["e_hat"] - single["noise_rate"])
        within = (single["e_low"] <= rate) & (rate <= single["e_high"])
        yield {
            "table": "noise",
            "arm": run.arm,
            "at": f"lr {run.lr:g}",
            "seeds": "all",
            "n": len(rate),
            "accuracy": _round(run.epochs[0].mean("accuracy", run.seeds)),
            "best accuracy": _round(max(p.mean("accuracy", run.seeds) for p in run.epochs)),
            "noise_rate": _round(float(rate.mean())),
            "e_hat": _round(float(single["e_hat"].mean())),
            "e_hat error": _round(float(error.mean())),
            "largest error": _round(float(error.max())),
            "covered": _round(float(within.mean())),
            "auc": _round(float(single["auc"].mean())),
            "auc_late": _round(float(single["auc_late"].mean())),
        }


def _against(point: Point, rival: Point | None, measure: str = "accuracy") -> dict:
    """Means of a point, and paired differences to a rival's."""
    seeds, word = reported([point])
    line = {"arm": _arm(point), "at": str(point), "seeds": word, "n": len(seeds)}
    line |= _means(point, seeds)
    if rival is None:
        return line
    seeds, _ = reported([point, rival])
    gaps = point.of(measure, seeds) - rival.of(measure, seeds)
    return {
        **line,
        "against": f"{BASELINE}, {rival}",
        "measure": measure,
        **_difference(gaps),
        **_difference(point.of("reward", seeds) - rival.of("reward", seeds), "reward "),
        "kl difference": _round(point.mean("kl", seeds) - rival.mean("kl", seeds)),
    }


def _means(point: Point, seeds: set[int]) -> dict:
    """Of all metrics; of the reference, those that are zero by definition."""
    known = METRICS if point.run is not None else ("reward", "kl")
    return {metric: _round(point.mean(metric, seeds)) for metric in known}


def _difference(differences: np.ndarray, kind: str = "") -> dict:
    mean, low, high = map(_round, interval(differences))
    return {f"{kind}difference": mean, f"{kind}low": low, f"{kind}high": high}


def _arm(point: Point) -> str:
    assert point.run is not None
    return point.run.arm


def _round(value: float) -> float | str:
    return round(value, 4) if math.isfinite(value) else ""
