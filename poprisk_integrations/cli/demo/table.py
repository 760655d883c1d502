"""The table of a demo, and the sentences under it."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from poprisk_integrations.cli.demo.comparison import Arm

__all__ = ["print_results"]


def print_results(
    console: Console,
    title: str,
    arms: Sequence[Arm],
    default_lr: float,
    sentences: Sequence[str],
) -> None:
    """Print the table, the definitions of its columns and the findings.

    Args:
        console: Where.
        title: Of the table.
        arms: Rows, in this order; a line is drawn between learning rates.
        default_lr: Its rows are marked.
        sentences: The findings.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("lr", "optimizer", "stop"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "accuracy", "swapped\nfitted", "clean\nfitted", "drift"):
        table.add_column(name, justify="right", no_wrap=True)
    rates = sorted({arm.learning_rate for arm in arms})
    for rate in rates:
        for index, arm in enumerate(arm for arm in arms if arm.learning_rate == rate):
            mark = "*" if rate == default_lr else ""
            table.add_row(
                f"{rate:.3g}{mark}" if index == 0 else "",
                arm.optimizer,
                "off" if not arm.stop else ("ended it" if arm.stopped else "not due"),
                str(arm.steps),
                f"{arm.accuracy:.3f}",
                f"{arm.swapped_fitted:.2f}",
                f"{arm.clean_fitted:.2f}",
                f"{arm.drift:.2f}",
            )
        table.add_section()
    console.print(table)
    console.print(
        "*: the default. accuracy: share of the held-out pairs, none swapped, whose human "
        "continuation the policy prefers more than the reference does; ties count half. Its "
        f"standard error is up to {max(arm.accuracy_se for arm in arms):.3f}. fitted: training "
        "pairs ranked as their label says, wrong (swapped) or right (clean). drift: mean of "
        "|beta log(policy/reference)| over held-out continuations. stop: a stopped run is the "
        "beginning of the run without it, so both are read off one run.",
        style="dim",
    )
    for sentence in sentences:
        console.print(f"\n\u2022 {sentence}", highlight=False)
