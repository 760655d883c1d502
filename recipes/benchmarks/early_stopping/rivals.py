"""Other people's stopping rules, on a trace: each returns the evaluation that it would keep.

Own ports from the papers. Where a paper leaves a number open (patience), it was chosen among the
values in `choices` on the selection seeds, like our own settings. All take a trace of `grid`, and
return one evaluation index per member, or None for a task where the rule does not apply.
"""

import numpy as np

__all__ = [
    "eb_criterion",
    "fixed_budget",
    "gradient_disparity",
    "hold_out",
    "label_wave",
    "lagged_product",
    "raw_u",
]

Trace = dict[str, np.ndarray]


def _first_run(fires: np.ndarray, patience: int) -> np.ndarray:
    """Per column, the index at which `fires` was true `patience` times in a row; else the last."""
    count = np.zeros(fires.shape[1], int)
    found = np.full(fires.shape[1], len(fires) - 1)
    done = np.zeros(fires.shape[1], bool)
    for i, row in enumerate(fires):
        count = np.where(row, count + 1, 0)
        now = (count >= patience) & ~done
        found[now], done = i, done | now
    return found


def eb_criterion(trace: Trace, patience: int = 1, stretch: float = 1.0) -> np.ndarray | None:
    """Mahsereci et al. 2017 (arXiv:1703.09580, eq. 7), on the whole training set at fixed weights.

    Stop when 1 - mean_k K gbar_k^2 / s_k^2 > 0; gbar and s^2 from the K micro-batches of an
    epoch, which estimate the per-example variance / (examples per micro-batch). `stretch`: go on
    to that multiple of the time (not in the paper).
    """
    if "full/p_eb" not in trace:
        return None
    found = 1 + _first_run(trace["full/p_eb"] < 1.0, patience)
    last = len(trace["full/test_loss"]) - 1
    return np.minimum(np.ceil(stretch * found).astype(int), last)


def raw_u(trace: Trace, patience: int = 1) -> np.ndarray | None:
    """The unbiased |E g|^2 of the training set at fixed weights falls below zero."""
    if "full/p_u" not in trace:
        return None
    return np.minimum(
        1 + _first_run(trace["full/p_u"] < 0.0, patience), len(trace["full/test_loss"]) - 1
    )


def lagged_product(trace: Trace, patience: int = 1) -> np.ndarray:
    """The lagged cross product C_t, averaged over a window, falls below zero."""
    found = _first_run(trace["full/w_progress"] < 0.0, patience)
    steps = trace["full/w_step"][found]
    return np.minimum(
        np.searchsorted(trace["full/eval_step"], steps), len(trace["full/test_loss"]) - 1
    )


def gradient_disparity(trace: Trace, rises: int = 5, in_a_row: bool = False) -> np.ndarray | None:
    """Forouzesh and Thiran 2021 (arXiv:2107.06665): stop after five rises of the mean distance.

    t1 counts all rises, t2 those in a row.
    """
    if "full/p_disparity" not in trace:
        return None
    rose = np.diff(trace["full/p_disparity"], axis=0) > 0
    last = len(trace["full/test_loss"]) - 1
    if in_a_row:
        return np.minimum(2 + _first_run(rose, rises), last)
    counted = np.cumsum(rose, axis=0) >= rises
    return np.minimum(2 + _first_run(counted, 1), last)


def label_wave(trace: Trace, k: int = 3, patience: int = 1) -> np.ndarray | None:
    """Yuan et al. 2024 (arXiv:2502.07551): first minimum of the changed training predictions.

    The number of predictions that changed since the last epoch, trailing mean over k epochs;
    the minimum is called when the next `patience` values are larger.
    """
    if "full/changed" not in trace:
        return None
    changed = trace["full/changed"][1:]
    smooth = np.stack([changed[max(0, i - k + 1) : i + 1].mean(0) for i in range(len(changed))])
    found = np.full(changed.shape[1], len(changed))
    for m in range(changed.shape[1]):
        best, waited = 0, 0
        for i in range(1, len(smooth)):
            best, waited = (i, 0) if smooth[i, m] < smooth[best, m] else (best, waited + 1)
            if waited >= patience:
                found[m] = best + 1
                break
    return found


def hold_out(trace: Trace, share: int, patience: int, by: str = "loss") -> np.ndarray | None:
    """Hold out 10 or 20 % (with the same noise); patience in epochs, best weights restored."""
    name = f"hold{share}/held_{by}"
    if name not in trace:
        return None
    values = trace[name] if by == "loss" else -trace[name]
    kept = np.zeros(values.shape[1], int)
    for m in range(values.shape[1]):
        waited = 0
        for i in range(1, len(values)):
            kept[m], waited = (i, 0) if values[i, m] < values[kept[m], m] else (kept[m], waited + 1)
            if waited == patience:
                break
    return kept


def fixed_budget(trace: Trace) -> np.ndarray:
    """The mean best epoch of the other seeds of the same condition: what a tuned budget gives."""
    best = trace["full/test_loss"].argmin(0)
    found = np.zeros_like(best)
    for condition in np.unique(trace["condition"]):
        members = np.where(trace["condition"] == condition)[0]
        for m in members:
            others = best[members[members != m]]
            found[m] = round(others.mean()) if len(others) else best[m]
    return found
