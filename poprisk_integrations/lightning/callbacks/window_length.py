"""How many optimizer steps a window of the stopping statistic holds."""

__all__ = ["SHORTEST_AUTO_WINDOW", "auto_window_steps", "total_steps"]

SHORTEST_AUTO_WINDOW = 8  # with fewer terms the noise of a window's own estimate decides


def auto_window_steps(micro_batches: int | None, accumulation: int, total: int | None) -> int:
    """Window length for `window="auto"`.

        one epoch              if the run has two epochs or more
        a third of an epoch    if it has fewer
        total / 20             if the length of an epoch is unknown
        but at least 8 steps

    A whole epoch sees each example once, so differences between examples cancel; a shorter run
    needs shorter windows to have several of them. The short step that ends an epoch whose
    micro-batches do not fill it is not counted: the window leaves it out.

    Args:
        micro_batches: Batches of one epoch on this rank, or None if unknown.
        accumulation: Micro-batches per optimizer step.
        total: Optimizer steps of the whole run, or None if unlimited.

    Raises:
        ValueError: If neither is known.

    Example:
        >>> auto_window_steps(100, 1, 300), auto_window_steps(100, 1, 150)
        (100, 33)
        >>> auto_window_steps(None, 1, 400)
        20
    """
    if micro_batches is None:
        if total is None:
            raise ValueError(
                "Invalid window: 'auto'. The data has no length and the run no max_steps; set the "
                "window to an integer >= 2."
            )
        steps = total // 20
    else:
        steps = max(1, micro_batches // accumulation)
        if total is not None and total < 2 * -(-micro_batches // accumulation):
            steps //= 3
    return max(SHORTEST_AUTO_WINDOW, steps)


def total_steps(
    micro_batches: int | None, accumulation: int, max_epochs: int | None, max_steps: int
) -> int | None:
    """Optimizer steps of a run, or None if unlimited or unknown.

    Args:
        micro_batches: Batches of one epoch on this rank, or None if unknown.
        accumulation: Micro-batches per optimizer step; Lightning also steps at an epoch's end.
        max_epochs: The trainer's; None or -1 for no limit.
        max_steps: The trainer's; -1 for no limit.
    """
    limits = [max_steps] if max_steps >= 0 else []
    if micro_batches is not None and max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * -(-micro_batches // accumulation))
    return min(limits, default=None)
