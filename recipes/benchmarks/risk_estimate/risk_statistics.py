"""From a run's steps to rows: correlation, bias, slope and coverage per phase and horizon."""

from collections.abc import Iterator

import numpy as np
import torch

from poprisk_integrations.core.standard_error import mean_standard_error

__all__ = ["ESTIMATORS", "REFERENCES", "compare", "epoch_rows", "phases", "rows_of", "windows"]

Trace = dict[str, np.ndarray]
ESTIMATORS = (
    "exact",
    "leave-one-out",
    "micro-8",
    "micro-4",
    "lagged",
    "both ends",
    "streaming",
    "moments",
    "moments, alpha=1",
    "naive",
    "batch loss",
)
# What no run has: held-out data, the whole training set's gradient.
REFERENCES = ("first order", "first order, both ends", "training set", "persistence")
WITH_SERIES = ("lagged", "streaming", "moments")  # `GradientWindow` gives the first one's
HORIZONS = (1, 10, 25, 50)
FEWEST = 6  # windows, for a correlation


def measured(trace: Trace) -> np.ndarray:
    """Decrease of the held-out loss at each step."""
    return (trace["measured_a"] + trace["measured_b"]) / 2


def best_step(trace: Trace) -> int:
    """End of the epoch with the smallest held-out loss."""
    length = int(trace["epoch_steps"])
    ends = np.arange(length, len(trace["held_loss"]), length)
    return int(ends[trace["held_loss"][ends].argmin()])


def phases(trace: Trace, stream: bool) -> dict[str, tuple[int, int]]:
    """Steps [first, last) of each phase by name."""
    steps = len(trace["exact"])
    if stream:
        # The preconditioner depends strongly on each batch while it is young.
        return {
            "first epoch": (0, steps),
            "from step 50": (min(50, steps - 1), steps),
            "second half": (steps // 2, steps),
        }
    epoch, best = int(trace["epoch_steps"]), best_step(trace)
    found = {
        "first epoch": (0, epoch),
        "until the best": (epoch, best),
        "after the best": (best, steps),
    }
    return {name: (a, b) for name, (a, b) in found.items() if a < b}


def windows(values: np.ndarray, first: int, last: int, horizon: int) -> np.ndarray:
    """Steps of a phase in whole windows, shape (W, horizon); what is left over is dropped."""
    count = (last - first) // horizon
    return values[first : first + count * horizon].reshape(count, horizon)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson; NaN where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def detrended(a: np.ndarray) -> np.ndarray:
    """Residuals of a straight line over the windows."""
    time = np.arange(len(a)) - (len(a) - 1) / 2
    return a - a.mean() - time * (time @ a) / (time @ time)


def compare(predicted: np.ndarray, actual: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """What is asked of one estimator in one phase, from its sums over windows.

    Args:
        predicted: Shape (W,).
        actual: Measured decrease of the held-out loss.
        true: The first-order term that is estimated, held-out gradient times step.

    Returns:
        `correlation`; `detrended`, the same without a straight line over time; `bias` = (mean
        predicted - mean measured) / mean |measured|; `slope` of measured on predicted; `error` =
        sd(predicted - measured) / sd(measured); `correlation_first_order` with `true`: what is
        missing there is the estimator's noise, not curvature; `bias_first_order` in the same unit
        as `bias`.
    """
    spread = predicted.var()
    size = np.abs(actual).mean()
    covariance = ((predicted - predicted.mean()) * (actual - actual.mean())).mean()
    return {
        "correlation": correlation(predicted, actual),
        "detrended": correlation(detrended(predicted), detrended(actual)),
        "bias": float((predicted.mean() - actual.mean()) / size),
        "slope": float(covariance / spread) if spread > 0 else float("nan"),
        "error": float((predicted - actual).std() / actual.std()),
        "correlation_first_order": correlation(predicted, true),
        "bias_first_order": float((predicted.mean() - true.mean()) / size),
    }


def ceiling(a: np.ndarray, b: np.ndarray) -> float:
    """Largest correlation that the held-out set's own noise allows, from its two halves.

    Spearman-Brown: reliability 2 r / (1 + r) of the mean of both, and its square root.
    """
    r = correlation(a, b)
    return float(np.sqrt(max(0.0, 2 * r / (1 + r))))


def series_error(steps: np.ndarray) -> np.ndarray:
    """Standard error of each window's sum from its own steps, as `GradientWindow` has it."""
    rows = torch.from_numpy(np.ascontiguousarray(steps))
    return np.array([mean_standard_error(row)[1] for row in rows]) * steps.shape[1]


def rows_of(trace: Trace, stream: bool) -> Iterator[dict]:
    """One row for each phase, horizon and estimator."""
    change = measured(trace)
    wanted = HORIZONS if stream else (1, 10, int(trace["epoch_steps"]))
    for phase, (first, last) in phases(trace, stream).items():
        for horizon in wanted:
            if (last - first) // horizon < FEWEST:
                continue
            cut = (first, last, horizon)
            actual = windows(change, *cut).sum(1)
            true = windows(trace["first order"], *cut).sum(1)
            halves = [windows(trace[f"measured_{h}"], *cut).sum(1) for h in "ab"]
            top = ceiling(*halves)
            for name in (*ESTIMATORS, *REFERENCES):
                if name == "training set" and stream:
                    continue
                row = {"phase": phase, "horizon": horizon, "estimator": name}
                if name == "persistence":
                    found = compare(actual[:-1], actual[1:], true[1:])
                else:
                    target = windows(target_of(trace, name), *cut).sum(1)
                    found = compare(windows(trace[name], *cut).sum(1), actual, target)
                covered = {} if name in REFERENCES else coverage(trace, name, cut, actual)
                text = {key: f"{value:.3g}" for key, value in {**found, **covered}.items()}
                blank = dict.fromkeys(("covered", "covered_first_order", "z", "covered_series"), "")
                yield {**row, "windows": len(actual), **blank, **text, "ceiling": f"{top:.4f}"}


def target_of(trace: Trace, name: str) -> np.ndarray:
    """The first-order term that an estimator is an estimate of: at the start, end, or both."""
    if name == "lagged":
        return 2 * trace["first order, both ends"] - trace["first order"]
    return trace["first order, both ends" if name == "both ends" else "first order"]


def coverage(trace: Trace, name: str, cut: tuple[int, int, int], actual: np.ndarray) -> dict:
    """Share of windows whose 95 % interval holds the measured change (or its first-order term).

    `covered`, `covered_first_order`: standard error from the pieces of each batch; steps of a
    window added as independent. `covered_series`: from the spread of the window's steps. `z`: over
    the whole phase, against the first-order term.
    """
    steps = windows(trace[name], *cut)
    off = np.abs(steps.sum(1) - actual)
    found = {}
    if f"var: {name}" in trace:
        first, last, _ = cut
        target = target_of(trace, name)[first:last]
        total = trace[f"var: {name}"][first:last].sum()
        found["z"] = float((trace[name][first:last] - target).sum() / np.sqrt(total))
        error = 1.96 * np.sqrt(windows(trace[f"var: {name}"], *cut).sum(1))
        found["covered"] = float((off <= error).mean())
        missed = np.abs(steps.sum(1) - windows(target_of(trace, name), *cut).sum(1))
        found["covered_first_order"] = float((missed <= error).mean())
    if cut[2] >= 10 and name in WITH_SERIES:
        found["covered_series"] = float((off <= 1.96 * series_error(steps)).mean())
    return found


def epoch_rows(traces: list[Trace]) -> Iterator[dict]:
    """Per epoch of a reused set, means over the runs: measured and predicted decrease."""
    length = int(traces[0]["epoch_steps"])
    names = (*ESTIMATORS, *(name for name in REFERENCES if name != "persistence"))
    columns = {"measured": np.mean([measured(t) for t in traces], 0)}
    columns |= {name: np.mean([t[name] for t in traces], 0) for name in names}
    sums = {name: windows(x, 0, len(x), length).sum(1) for name, x in columns.items()}
    held = np.mean([t["held_loss"] for t in traces], 0)
    for epoch in range(len(sums["measured"])):
        values = {name: f"{x[epoch]:.5g}" for name, x in sums.items()}
        yield {"epoch": epoch + 1, "held_loss": f"{held[(epoch + 1) * length]:.5g}", **values}


def sign_change(trace: Trace, name: str) -> float:
    """First epoch after which the mean prediction of three epochs is not positive; inf if none."""
    length = int(trace["epoch_steps"])
    sums = windows(trace[name], 0, len(trace[name]), length).sum(1)
    smooth = np.convolve(sums, np.ones(3) / 3, "valid")
    below = np.flatnonzero(smooth <= 0)
    return float(below[0] + 2) if len(below) else float("inf")
