"""The stop on a plain run, afterwards: the package's `StoppingRule`, fed with recorded windows."""

import numpy as np

from poprisk_integrations.core import StoppingConfig, StoppingRule

__all__ = ["at_epoch", "stop_epochs"]

Trace = dict[str, np.ndarray]


def stop_epochs(trace: Trace, window: str, config: StoppingConfig | None = None) -> np.ndarray:
    """Epoch of the stop, a fraction; the run's last if the rule never stops. Shape (M,).

    Args:
        trace: A run at constant learning rate, whose size does not matter then.
        window: "third" or "epoch".
        config: Of the rule; None for its defaults.
    """
    ends = trace[f"{window}_end"].astype(int)
    epoch_steps, total = int(trace["epoch_steps"]), len(trace["update_norm"])
    found = []
    for member in range(len(trace["seed"])):
        rule, before, stop = StoppingRule(config), 0, None
        for place, end in enumerate(ends):
            due = _due(rule)
            if due is not None and due <= end:  # between two windows nothing but time passes
                stop = max(due, before)
                break
            decision = rule.update(
                step=int(end),
                lr=float(end - before),
                ratio=float(trace[f"{window}_ratio"][place, member]),
                ratio_se=float(trace[f"{window}_error"][place, member]),
                noise=float(trace[f"{window}_noise"][place, member]),
                reused=bool(before >= epoch_steps),
            )
            before = int(end)
            if decision.stop:
                stop = before
                break
        due = _due(rule) if stop is None else stop
        found.append(total if due is None else min(due, total))
    return np.array(found) / epoch_steps


def at_epoch(trace: Trace, name: str, epochs: np.ndarray) -> np.ndarray:
    """A metric of shape (E, M) at one epoch for each member, between evaluations linearly."""
    columns = zip(epochs, trace[name].T, strict=True)
    return np.array([np.interp(epoch, trace["epoch"], column) for epoch, column in columns])


def _due(rule: StoppingRule) -> int | None:
    """First step at which the rule would stop if no further window came."""
    state = rule.state
    if state.onset_lr_sum is None or state.onset_kappa is None:
        return None
    return int(np.ceil(state.onset_kappa * state.onset_lr_sum * (1 - 1e-9)))
