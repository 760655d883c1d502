"""How many optimizer steps a window of the stopping statistic holds."""

__all__ = ["SHORTEST_AUTO_WINDOW", "auto_window_steps"]

SHORTEST_AUTO_WINDOW = 8  # with fewer terms the noise of a window's own estimate decides
EPOCHS_FOR_WHOLE_ONES = 8


def auto_window_steps(max_steps: int | None, epoch_steps: int | None) -> int:
    """Window length for `window="auto"`.

        one epoch               if the run has eight epochs or more, or no known end
        a third of an epoch     if it has fewer
        max_steps / 20          if the length of an epoch is unknown
        but at least 8 steps

    Over a whole epoch each example is seen once and its sampling noise cancels: on digits with
    wrong labels the mean regret of the stop was 0.027 nats with one epoch, 0.029 with half of
    one, 0.14 with a third (`recipes/benchmarks/stop_digits`). But two windows must fit before the
    onset and as much time after it, which in a short run only shorter windows leave.

    Args:
        max_steps: Optimizer steps of the whole run; None if it has no known end.
        epoch_steps: Optimizer steps of one epoch; None if unknown.

    Example:
        >>> auto_window_steps(800, 100), auto_window_steps(300, 100), auto_window_steps(400, None)
        (100, 33, 20)
    """
    if epoch_steps is None:
        steps = (max_steps or 0) // 20
    elif max_steps is None or max_steps >= EPOCHS_FOR_WHOLE_ONES * epoch_steps:
        steps = epoch_steps
    else:
        steps = epoch_steps // 3
    return max(SHORTEST_AUTO_WINDOW, steps)
