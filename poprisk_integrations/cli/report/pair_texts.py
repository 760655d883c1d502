"""What --dataset adds to a run's suspect pairs: their texts, and groups of pairs."""

import argparse
from dataclasses import replace

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.run import MOST_PAIRS, Run, plain

__all__ = ["add_texts"]


def add_texts(run: Run, args: argparse.Namespace) -> None:
    """Read the data that `args` name, as `poprisk flips` does; UsageError if they are others."""
    from poprisk_integrations._imports import require

    require("transformers", "datasets", "trl", extra="trl")
    from poprisk_integrations.cli.flips import study
    from poprisk_integrations.cli.flips.arguments import flips_command
    from poprisk_integrations.cli.flips.data import load_data
    from poprisk_integrations.cli.flips.groups import group_pairs
    from poprisk_integrations.trl.flip_report import FlipReport
    from poprisk_integrations.trl.pairs import excerpts

    path = next((file for file in run.files if file.name == "flip_report.csv"), None)
    if run.suspects is None or path is None:
        raise UsageError(
            f"Invalid --dataset: there is no flip report in {str(run.directory)!r} whose pairs "
            "could be shown."
        )
    report = FlipReport.load(path)
    swapped = study.load_swapped_rows(path.parent, report) or set()
    dataset, places = load_data(args, report, swapped, quiet=args.json)
    names = [name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names]
    texts = dataset.with_format(None).select_columns(names)
    pairs = run.suspects.pairs.copy()
    place_of = dict(zip(map(str, report.to_pandas()["row"]), places, strict=True))
    for label in pairs.index[:MOST_PAIRS]:
        shown = excerpts(texts[place_of[pairs.at[label, "row"]]])
        for name, text in zip(("prompt", "chosen", "rejected"), shown, strict=True):
            pairs.at[label, name] = plain(text)
    groups = group_pairs(report, dataset, places, args.annotator_column)
    command = flips_command(
        path.parent,
        args.dataset,
        id_column=args.id_column,
        config=args.dataset_config,
        split=args.split,
    )
    run.suspects = replace(run.suspects, pairs=pairs, groups=groups, command=command)
