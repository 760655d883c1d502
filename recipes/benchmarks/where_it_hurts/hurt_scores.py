"""Score rows of one toy: the harness's, and what each arm does at AdamW's own rate."""

import numpy as np
from gate_harness.scores import score_rows
from toy import Toy

__all__ = ["toy_scores"]

Trace = dict[str, np.ndarray]


def toy_scores(toy: Toy, traces: dict[str, Trace]) -> list[dict]:
    """For each arm and seed: tuned and range scores, and the run at AdamW's tuned rate.

    `in_place` is that run's accuracy, `step_ratio` the mean length of its updates relative to
    AdamW's. `loss`, `probe` and `jump` are of the run at the arm's own tuned rate.

    Args:
        toy: What was run.
        traces: By arm, AdamW among them.
    """
    usual = {r["seed"]: float(r["tuned_lr"]) for r in _harness_rows("AdamW", traces)}
    rows = []
    for arm, trace in traces.items():
        for row in _harness_rows(arm, traces):
            own = _member(trace, row["seed"], float(row["tuned_lr"]))
            same = _member(trace, row["seed"], usual[row["seed"]])
            base = traces["AdamW"]["update_norm"][:, same].mean()
            rows.append(
                {
                    "task": toy.name,
                    **row,
                    "in_place": f"{_end(trace, 'accuracy', same):.6g}",
                    "in_place_lr": f"{usual[row['seed']]:g}",
                    "step_ratio": f"{trace['update_norm'][:, same].mean() / base:.4g}",
                    "loss": f"{trace['loss'][-1, own]:.6g}",
                    "probe": f"{trace['probe'][-1, own]:.6g}",
                    "jump": _jump(toy, trace, own),
                    "jump_in_place": _jump(toy, trace, same),
                }
            )
    return rows


def _harness_rows(arm: str, traces: dict[str, Trace]) -> list[dict]:
    return score_rows(arm, traces[arm], "accuracy", higher=True)


def _member(trace: Trace, seed: int, lr: float) -> int:
    (place,) = np.flatnonzero((trace["seed"] == seed) & np.isclose(trace["lr"], lr))
    return int(place)


def _end(trace: Trace, metric: str, place: int) -> float:
    """As in the harness's scores: what diverged or got worse counts as untrained."""
    first, last = trace[metric][0, place], trace[metric][-1, place]
    return float(first if trace["diverged"][place] else np.fmax(first, last))


def _jump(toy: Toy, trace: Trace, place: int) -> int | str:
    return "" if toy.jump is None else int(trace["probe"][-1, place] > toy.jump)
