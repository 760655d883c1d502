"""Our rule on a trace: the package's `StoppingRule`, fed with recorded windows."""

import math
from dataclasses import replace

import numpy as np

from poprisk_integrations.core import StoppingConfig, StoppingRule

__all__ = ["DEFAULT", "VARIANTS", "learning_rates", "ratios", "stop_steps"]

DEFAULT = StoppingConfig()
PLAIN = {"stretch": 1.0, "unarmed_windows": 10**9}
# name: (which F, configuration)
VARIANTS = {
    "poprisk": ("white", DEFAULT),
    "kappa 1": ("white", replace(DEFAULT, kappa=1.0)),
    "kappa 3": ("white", replace(DEFAULT, kappa=3.0)),
    "confidence 1": ("white", replace(DEFAULT, confidence=1.0)),
    "no stretch": ("white", replace(DEFAULT, stretch=1.0)),
    "armed only": ("white", replace(DEFAULT, unarmed_windows=10**9)),
    "pooled": ("pooled", DEFAULT),
    "pooled, plain": ("pooled", replace(DEFAULT, **PLAIN)),
}

Trace = dict[str, np.ndarray]


def ratios(trace: Trace, kind: str) -> np.ndarray:
    """F per window and member, shape (W, M): whitened per coordinate, or pooled per tensor.

    Windows of more than one epoch see each example several times: their sum averages the noise of
    one epoch only, so F is divided by the number of passes.
    """
    steps, numel = float(trace["full/window_steps"]), trace["full/numel"]
    passes = max(1.0, steps / float(trace["full/epoch_steps"]))
    if kind == "white":
        return trace["full/w_white"] / passes
    per_tensor = trace["full/w_signal"] / (steps * trace["full/w_noise"])
    return (per_tensor * (numel / numel.sum())).sum(-1) / passes


def learning_rates(trace: Trace, schedule: str) -> np.ndarray:
    """Of each step of the run on all data."""
    total, lr = int(trace["full/total_steps"]), float(trace["full/lr"])
    if schedule == "constant":
        return np.full(total, lr)
    return 0.5 * lr * (1 + np.cos(math.pi * np.arange(total) / total))


def stop_steps(
    trace: Trace, schedule: str, kind: str, config: StoppingConfig, stream: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Step of the stop (the run's length if it never stops) and of the onset (-1), per member."""
    values, errors = ratios(trace, kind), trace["full/w_pooled_spread"]
    noise = trace["full/w_noise"].sum(-1)
    ends = trace["full/w_step"].astype(int)
    lrs = learning_rates(trace, schedule)
    total, members = len(lrs), values.shape[1]
    stops, onsets = np.full(members, total), np.full(members, -1)
    time = np.concatenate([[0.0], np.cumsum(lrs)])
    for m in range(members):
        rule = StoppingRule(config)
        before = 0
        for window, end in enumerate(ends):
            due = _due(rule, time)
            if due <= end:  # between two windows nothing but time passes
                stops[m] = max(due, before)
                break
            decision = rule.update(
                step=int(end),
                lr=time[end] - time[before],
                ratio=float(values[window, m]),
                ratio_se=float(errors[window, m]),
                noise=float(noise[window, m]),
                reused=not stream and window > 0,
            )
            before = end
            if decision.stop:
                stops[m] = end
                break
        else:
            stops[m] = min(_due(rule, time), total)
        onsets[m] = -1 if rule.state.onset_step is None else rule.state.onset_step
    return stops, onsets


def _due(rule: StoppingRule, time: np.ndarray) -> int:
    """First step at which the rule would stop if no further window came."""
    state = rule.state
    if state.onset_lr_sum is None or state.onset_kappa is None:
        return len(time)
    return int(np.searchsorted(time, state.onset_kappa * state.onset_lr_sum * (1 - 1e-9)))
