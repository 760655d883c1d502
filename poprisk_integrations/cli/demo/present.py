"""Runs the job behind a progress bar, writes its files and prints its table."""

import json
import os
import sys
from pathlib import Path

from rich.console import Console

from poprisk_integrations.cli.demo.output_files import write_json
from poprisk_integrations.cli.demo.settings import FULL, QUICK
from poprisk_integrations.cli.output import writing

__all__ = ["run_and_write"]


def run_and_write(directory: Path, *, quick: bool, seed: int, quiet: bool, as_json: bool) -> None:
    """Run the demo; write `results.json` and `report.png`.

    Args:
        directory: Exists and can be written.
        quick: Small sizes.
        seed: Of all that is random.
        quiet: No progress and no table.
        as_json: JSON on stdout instead of the table.
    """
    errors = Console(file=sys.stderr)  # before the output of the libraries is held back
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the hub
    if not quiet:
        errors.print("loading the libraries ...", style="dim")
    from poprisk_integrations.cli.demo.quiet import held_back

    settings = QUICK if quick else FULL
    with held_back():
        from poprisk_integrations.cli.demo.figure import draw, save_figure
        from poprisk_integrations.cli.demo.job import phase_weights, run_job
        from poprisk_integrations.cli.demo.progress import job_progress

        with job_progress(phase_weights(settings), errors, quiet=quiet) as progress:
            result = run_job(settings, seed=seed, quick=quick, progress=progress)
        write_json(directory / "results.json", result.record)  # minutes of work: before all else
        subtitle = (
            f"{result.record['data']['train_pairs']} training pairs, "
            f"{100 * settings.swapped_share:.0f} % swapped; "
            f"{result.record['data']['heldout_pairs']} clean held-out pairs; "
            f"{result.record['data']['model_parameters'] / 1e6:.2f}M parameters; seed {seed}"
        )
        figure = draw(result.runs, settings.learning_rate, subtitle)
    with writing(directory / "report.png") as temporary:
        save_figure(figure, temporary)
    if as_json:
        print(json.dumps(result.record, indent=2, allow_nan=False))
    elif not quiet:
        from poprisk_integrations.cli.demo.table import print_results

        console = Console()
        title = f"DPO with {100 * settings.swapped_share:.0f} % of the training labels swapped"
        print_results(console, title, result.arms, settings.learning_rate, result.sentences)
        console.print(f"\nWrote {directory / 'results.json'} and {directory / 'report.png'}")
