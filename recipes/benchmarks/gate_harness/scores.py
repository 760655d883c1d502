"""From traces to rows: what is committed, tuned and untuned scores, paired intervals."""

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["RANGE", "interval", "member_rows", "relative", "score_rows"]

Trace = dict[str, np.ndarray]
RANGE = (3e-4, 1e-3, 3e-3, 1e-2)


def member_rows(arm: str, trace: Trace, metrics: Sequence[str]) -> list[dict]:
    """One row for each member: metrics before, at the end and at their extremes, and the gate."""
    rows = []
    for m in range(len(trace["seed"])):
        row = {
            "arm": arm,
            "condition": str(trace["condition"][m]),
            "lr": f"{trace['lr'][m]:g}",
            "weight_decay": f"{trace['weight_decay'][m]:g}",
            "seed": int(trace["seed"][m]),
            "diverged": int(trace["diverged"][m]),
            "finished_at": int(trace["finished_at"][m]),
            "moved_share": f"{trace['moved_share'][:, m].mean():.4f}",
            "update_norm": f"{trace['update_norm'][:, m].mean():.5g}",
        }
        for name in metrics:
            values = trace[name][:, m]
            row |= {
                f"{name}_start": f"{values[0]:.6g}",
                f"{name}_end": f"{values[-1]:.6g}",
                f"{name}_min": f"{np.nanmin(values):.6g}",
                f"{name}_min_step": int(trace["eval_step"][np.nanargmin(values)]),
                f"{name}_max": f"{np.nanmax(values):.6g}",
                f"{name}_max_step": int(trace["eval_step"][np.nanargmax(values)]),
            }
        rows.append(row)
    return rows


def score_rows(
    arm: str, trace: Trace, metric: str, *, higher: bool, lrs: Sequence[float] = RANGE
) -> list[dict]:
    """One row for each condition and seed: tuned, tuned and stopped, mean over a range of rates.

    Rates (and the evaluation step) are chosen by the mean over the other seeds; with a single
    seed by itself. A value that is not finite, or worse than before training, counts as untrained.

    Args:
        arm: Name.
        trace: Of all members; every (condition, seed) has the same rates.
        metric: Its name in the trace.
        higher: Whether more is better.
        lrs: The range; those that were run.
    """
    turn = 1.0 if higher else -1.0
    rows = []
    for condition in dict.fromkeys(trace["condition"].tolist()):
        chosen = trace["condition"] == condition
        seeds = list(dict.fromkeys(trace["seed"][chosen].tolist()))
        rates = list(
            dict.fromkeys(zip(trace["lr"][chosen], trace["weight_decay"][chosen], strict=True))
        )
        values = np.stack(  # (rates, seeds, evaluations), more is better
            [
                [_at(trace, metric, turn, chosen, seed=seed, lr=lr, decay=decay) for seed in seeds]
                for lr, decay in rates
            ]
        )
        for place, seed in enumerate(seeds):
            others = np.delete(values, place, 1) if len(seeds) > 1 else values
            mean = others.mean(1)  # (rates, evaluations)
            best = int(mean[:, -1].argmax())
            stopped = np.unravel_index(mean.argmax(), mean.shape)
            decay = rates[best][1]
            wanted = [i for i, (lr, d) in enumerate(rates) if d == decay and _in(lr, lrs)]
            rows.append(
                {
                    "arm": arm,
                    "condition": condition,
                    "seed": seed,
                    "metric": metric,
                    "higher": int(higher),
                    "tuned": _text(turn * values[best, place, -1]),
                    "tuned_lr": f"{rates[best][0]:g}",
                    "tuned_decay": f"{decay:g}",
                    "tuned_stopped": _text(turn * values[stopped[0], place, stopped[1]]),
                    "stopped_lr": f"{rates[stopped[0]][0]:g}",
                    "stopped_step": int(trace["eval_step"][stopped[1]]),
                    "range": _text(turn * values[wanted, place, -1].mean()) if wanted else "",
                    "range_worst": _text(turn * values[wanted, place, -1].min()) if wanted else "",
                }
            )
    return rows


def _at(trace: Trace, metric: str, turn: float, chosen, *, seed, lr, decay) -> np.ndarray:
    here = chosen & (trace["seed"] == seed) & (trace["lr"] == lr)
    (m,) = np.flatnonzero(here & (trace["weight_decay"] == decay))
    values = turn * trace[metric][:, m].astype(np.float64)
    if trace["diverged"][m]:
        values[-1] = values[0]
    return np.fmax(values, values[0])  # fmax: the other one where one is NaN


def _in(lr: float, lrs: Sequence[float]) -> bool:
    return any(abs(lr / wanted - 1) < 1e-6 for wanted in lrs)


def _text(value: float) -> str:
    return f"{value:.6g}"


def relative(arm: float, base: float, *, higher: bool) -> float:
    """(arm - base) / |base|, positive where the arm is better."""
    return (arm - base) / abs(base) * (1.0 if higher else -1.0)


def interval(
    differences: dict[tuple[str, int], float] | Iterable[tuple[tuple[str, int], float]],
    draws: int = 10_000,
) -> tuple[float, float, float]:
    """Mean over tasks of the mean over seeds, and its 95 % bootstrap interval over seeds.

    Args:
        differences: Paired differences by (task, seed).
        draws: Resamples; seeds are drawn within each task.
    """
    by_task: dict[str, list[float]] = {}
    for (task, _), value in dict(differences).items():
        by_task.setdefault(task, []).append(value)
    rng = np.random.default_rng(0)
    means, resampled = [], []
    for values in by_task.values():
        x = np.asarray(values)
        means.append(x.mean())
        resampled.append(x[rng.integers(0, len(x), (draws, len(x)))].mean(1))
    low, high = np.quantile(np.mean(resampled, 0), [0.025, 0.975])
    return float(np.mean(means)), float(low), float(high)
