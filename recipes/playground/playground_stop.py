"""Where the stop would have ended a run: the package's rule on recorded windows."""

from collections.abc import Sequence

from poprisk_integrations.core import StoppingConfig, StoppingRule

__all__ = ["stop_step"]


def stop_step(
    lr: float,
    window_steps: int,
    ratios: Sequence[float],
    errors: Sequence[float],
    noises: Sequence[float],
    config: StoppingConfig | None = None,
) -> int | None:
    """Optimizer step of the stop; None if the run reaches its end.

    As in training with the callbacks and a constant rate: the first window is of fresh data, and
    between two windows nothing but time passes, so that the rule's own prediction is the stop.

    Args:
        lr: Constant learning rate.
        window_steps: Steps in a window.
        ratios: F of each window.
        errors: Their standard errors.
        noises: S of each window.
        config: Settings of the rule, the defaults unless given.
    """
    rule = StoppingRule(config)
    step = 0
    for ratio, error, noise in zip(ratios, errors, noises, strict=True):
        due = rule.predicted_stop_step(step, lr)
        if due is not None and due < step + window_steps:
            return due
        step += window_steps
        decision = rule.update(
            step=step,
            lr=lr * window_steps,
            ratio=ratio,
            ratio_se=error,
            noise=noise,
            reused=step > window_steps,
        )
        if decision.stop:
            return step
    return None
