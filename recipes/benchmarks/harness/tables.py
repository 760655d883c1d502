"""From traces to rows, from rows to scores, and from scores to paired differences and words."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from benchmarks.harness.provenance import read_csv
from benchmarks.harness.train import Trace

__all__ = [
    "RANGE",
    "SCORES",
    "Found",
    "Paired",
    "against",
    "comparisons",
    "differences",
    "interval",
    "member_rows",
    "read_scores",
    "relative",
    "score_rows",
    "seed_means",
    "summary_rows",
    "word",
]

RANGE = (3e-4, 1e-3, 3e-3, 1e-2)
SCORES = ("tuned", "tuned_stopped", "range")
Paired = dict[tuple[str, int], float]  # by (task, seed)
Found = tuple[float, float, float]  # mean, and its interval


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
            "finished_at": -1,  # of studies in which members leave early
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
    Every (condition, seed) of the trace has the same rates; of `lrs`, the range, those count that
    were run.
    """
    turn = 1.0 if higher else -1.0
    rows = []
    for condition in dict.fromkeys(trace["condition"].tolist()):
        chosen = trace["condition"] == condition
        seeds = list(dict.fromkeys(trace["seed"][chosen].tolist()))
        rates = list(
            dict.fromkeys(zip(trace["lr"][chosen], trace["weight_decay"][chosen], strict=True))
        )

        def at(seed: int, lr: float, decay: float, chosen: np.ndarray = chosen) -> np.ndarray:
            here = chosen & (trace["seed"] == seed) & (trace["lr"] == lr)
            (m,) = np.flatnonzero(here & (trace["weight_decay"] == decay))
            values = turn * trace[metric][:, m].astype(np.float64)
            if trace["diverged"][m]:
                values[-1] = values[0]
            return np.fmax(values, values[0])  # fmax: the other one where one is NaN

        # (rates, seeds, evaluations), more is better
        values = np.stack([[at(seed, lr, decay) for seed in seeds] for lr, decay in rates])
        for place, seed in enumerate(seeds):
            others = np.delete(values, place, 1) if len(seeds) > 1 else values
            mean = others.mean(1)  # (rates, evaluations)
            best = int(mean[:, -1].argmax())
            stopped = np.unravel_index(mean.argmax(), mean.shape)
            decay = rates[best][1]
            wanted = [
                i
                for i, (lr, d) in enumerate(rates)
                if d == decay and any(abs(lr / one - 1) < 1e-6 for one in lrs)
            ]
            ends = values[wanted, place, -1]
            rows.append(
                {
                    "arm": arm,
                    "condition": condition,
                    "seed": seed,
                    "metric": metric,
                    "higher": int(higher),
                    "tuned": f"{turn * values[best, place, -1]:.6g}",
                    "tuned_lr": f"{rates[best][0]:g}",
                    "tuned_decay": f"{decay:g}",
                    "tuned_stopped": f"{turn * values[stopped[0], place, stopped[1]]:.6g}",
                    "stopped_lr": f"{rates[stopped[0]][0]:g}",
                    "stopped_step": int(trace["eval_step"][stopped[1]]),
                    "range": f"{turn * ends.mean():.6g}" if wanted else "",
                    "range_worst": f"{turn * ends.min():.6g}" if wanted else "",
                }
            )
    return rows


def relative(arm: float, base: float, *, higher: bool) -> float:
    """(arm - base) / |base|, positive where the arm is better."""
    return (arm - base) / abs(base) * (1.0 if higher else -1.0)


def interval(paired: Paired, draws: int = 10_000) -> Found:
    """Mean over tasks of the mean over seeds, and its 95 % bootstrap interval over seeds."""
    by_task: dict[str, list[float]] = {}
    for (task, _), value in paired.items():
        by_task.setdefault(task, []).append(value)
    rng = np.random.default_rng(0)
    means, resampled = [], []
    for values in by_task.values():
        x = np.asarray(values)
        means.append(x.mean())
        # Seeds are drawn within each task: the tasks are those of the study, no sample of others.
        resampled.append(x[rng.integers(0, len(x), (draws, len(x)))].mean(1))
    low, high = np.quantile(np.mean(resampled, 0), [0.025, 0.975])
    return float(np.mean(means)), float(low), float(high)


def word(low: float, high: float) -> str:
    """Of the interval of a difference."""
    return "better" if low > 0 else "worse" if high < 0 else "level"


def differences(
    scores: Sequence[dict], arm: str, base: str, column: str, metric: str | None = None
) -> Paired:
    """Relative differences of two arms by (condition, seed), positive where `arm` is better."""
    values: dict[str, Paired] = {arm: {}, base: {}}
    higher = True
    for row in scores:
        if row["arm"] in values and row[column] != "" and metric in (None, row["metric"]):
            values[row["arm"]][row["condition"], int(row["seed"])] = float(row[column])
            higher = str(row["higher"]) in ("1", "True")
    return {
        key: relative(value, values[base][key], higher=higher)
        for key, value in values[arm].items()
        if key in values[base]
    }


def summary_rows(
    scores: Sequence[dict],
    groups: dict[str, Callable[[str], bool]],
    more: dict[str, Callable[[Paired], Paired]] | None = None,
) -> list[dict]:
    """Every arm against AdamW, and every gate against its controls, in groups of conditions.

    Args:
        scores: Rows of `score_rows`, all arms and metrics.
        groups: By name, which conditions.
        more: By name, from differences to AdamW to other ones; lines of their own after the groups.
    """
    arms = list(dict.fromkeys(row["arm"] for row in scores))
    pairs = [(arm, "AdamW") for arm in arms if arm != "AdamW"]
    for name in arms:
        gated = name.partition("(")[2].rstrip(")")
        if gated in arms:
            pairs.append((gated, name))
    rows = []
    for metric in dict.fromkeys(row["metric"] for row in scores):
        for arm, base in pairs:
            for column in SCORES:
                paired = differences(scores, arm, base, column, metric)
                parts = {
                    group: {key: v for key, v in paired.items() if is_in(key[0])}
                    for group, is_in in groups.items()
                }
                if base == "AdamW":
                    parts |= {name: of(paired) for name, of in (more or {}).items()}
                for group, part in parts.items():
                    mean, low, high = interval(part)
                    rows.append(
                        {"metric": metric, "arm": arm, "base": base, "score": column}
                        | {"conditions": group, "mean": f"{mean:.5f}"}
                        | {"low": f"{low:.5f}", "high": f"{high:.5f}", "word": word(low, high)}
                    )
    return rows


def against(summary: Sequence[dict], arm: str, base: str, column: str, group: str) -> dict:
    """A line of `summary_rows`, of its first metric."""
    wanted = {"arm": arm, "base": base, "score": column, "conditions": group}
    return next(row for row in summary if wanted.items() <= row.items())


def read_scores(studies: Sequence[str], stem: str, folder: Path) -> dict[str, list[dict]]:
    """Committed score rows by study, on the study's first metric, which is its main one."""
    found = {}
    for study in studies:
        for path in sorted((folder / study / "results").glob(f"{stem}_*.csv")):
            rows = read_csv(path)
            found[study] = [row for row in rows if row["metric"] == rows[0]["metric"]]
    return found


def seed_means(rows: Sequence[dict], arm: str, score: str) -> dict[int, float]:
    """Relative difference to AdamW by seed, mean over conditions; {} if the arm was not run."""
    by_seed: dict[int, list[float]] = {}
    for (_, seed), value in differences(rows, arm, "AdamW", score).items():
        by_seed.setdefault(seed, []).append(value)
    return {seed: sum(found) / len(found) for seed, found in by_seed.items()}


def comparisons(scores: dict[str, list[dict]], draws: int = 10_000) -> list[dict]:
    """One row for each study and arm, and for each arm over all studies that ran it."""
    table = []
    arms = dict.fromkeys(row["arm"] for rows in scores.values() for row in rows)
    for arm in (name for name in arms if name != "AdamW"):
        everywhere: dict[str, Paired] = {"tuned": {}, "range": {}}
        ran = [study for study, rows in scores.items() if seed_means(rows, arm, "tuned")]
        for study in ran:
            found = {
                score: {(study, s): v for s, v in seed_means(scores[study], arm, score).items()}
                for score in everywhere
            }
            table.append({"study": study, "arm": arm, **_numbers(found, draws)})
            everywhere = {score: everywhere[score] | found[score] for score in everywhere}
        table.append({"study": f"all {len(ran)}", "arm": arm, **_numbers(everywhere, draws)})
    return table


def _numbers(values: dict[str, Paired], draws: int) -> dict[str, str]:
    row = {"seeds": str(len(values["tuned"]))}
    for score, found in values.items():
        mean, low, high = interval(found, draws)
        row |= {score: f"{mean:.5f}", f"{score}_low": f"{low:.5f}", f"{score}_high": f"{high:.5f}"}
    return row
