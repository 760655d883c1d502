"""`poprisk flips RUN_DIR`: the pairs whose label is probably wrong, and data without them."""

# TRL exports lazily.
# mypy: disable-error-code="attr-defined"

import argparse
import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poprisk_integrations._files import write_whole
from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

    from poprisk_integrations.trl.flip_report import FlipReport

__all__ = ["add_parser", "run"]

_NOISE = "poprisk_noise.json"
_FIGURE = "flip_report.png"
_TEXTS = ("prompt", "chosen", "rejected")
_SUFFIXES = (".jsonl", ".csv", ".parquet")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `flips` to the command line."""
    parser = subparsers.add_parser(
        "flips",
        help="pairs whose label is probably wrong, and data without them",
        description="Reads the flip report of a DPO run, prints the most suspect pairs and draws "
        f"{_FIGURE} beside it. With --write it also writes the data set without them, or with "
        "their labels exchanged. Of a run that swapped labels on purpose (flip_rate) it says how "
        "many of these the report found; it then makes the same swaps in --dataset, which is what "
        "the trainer saw.",
    )
    add = parser.add_argument
    add(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="directory of a run, or a flip report (.csv or .parquet)",
    )
    add("--dataset", metavar="NAME_OR_PATH", help="the training data, to show and write pairs")
    add("--dataset-config", metavar="NAME", help="its configuration, where there are several")
    add("--split", default="train", help="its split (default: %(default)s)")
    add("--id-column", metavar="NAME", help="its column that holds the ids of the report")
    add("--top", type=_count, default=20, metavar="N", help="pairs to show (default: %(default)s)")
    add(
        "--min-probability",
        type=_probability,
        metavar="P",
        help="show no pair below it, and drop or swap from it on (default: show all, change from "
        "0.5 on)",
    )
    add("--write", type=Path, metavar="OUT", help="cleaned data: .jsonl, .csv or .parquet")
    add(
        "--mode",
        choices=("drop", "swap", "suggested"),
        help="what --write does to suspect pairs (default: drop); suggested: what the column "
        "'action' says, also in a flip_report.csv that you have edited and pass as RUN_DIR",
    )
    add("--force", action="store_true", help="let --write replace a file")
    add("--figure", type=Path, metavar="PNG", help="the picture to write instead")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print, draw and write.

    Raises:
        UsageError: If the report, the data or an output cannot be used.
        ImportError: If the extra is missing.
    """
    _check_arguments(args)
    require("transformers", "datasets", "trl", extra="trl")
    if args.figure is not None:
        require("matplotlib", extra="demo")
    from poprisk_integrations.cli.flips_study import flips_found, load_swapped_rows
    from poprisk_integrations.trl.flip_report import FlipReport

    try:
        report = FlipReport.load(args.run_dir)
    except FileNotFoundError as error:
        raise UsageError(
            f"Invalid run_dir: {error}. PopRiskDPOTrainer writes it at the end of a run."
        ) from None
    directory = args.run_dir if args.run_dir.is_dir() else args.run_dir.parent
    swapped_rows = load_swapped_rows(directory, report)
    found = None if swapped_rows is None else flips_found(report, swapped_rows)
    noise = _load_noise(directory / _NOISE)
    top = report.top(args.top)
    pairs = top[top["probability_wrong"] >= (args.min_probability or 0.0)].to_dict("records")
    examples, written = None, None
    if args.dataset is not None:
        dataset, rows = _load_data(args, report, swapped_rows or set())
        examples = _examples(dataset, rows[: len(pairs)])  # the report's order is that of `rows`
        if args.write is not None:
            written = _write(args, report, dataset, rows)
    elif pairs and all(pair.get("chosen") for pair in pairs):
        examples = [{name: pair[name] for name in _TEXTS} for pair in pairs]  # the report's own
    figure = args.figure or directory / _FIGURE
    drawn = _draw(report, figure, str(directory), swapped_rows)
    if args.json:
        result = {
            "report": str(args.run_dir),
            "summary": report.summary(),
            "noise": noise,
            "study": None if found is None else found.to_json(),
            "top": pairs
            if examples is None
            else [{**p, **e} for p, e in zip(pairs, examples, strict=True)],
            "written": written,
            "figure": str(figure) if drawn else None,
        }
        print(json.dumps(result, indent=2, allow_nan=False, default=str))
    elif not args.quiet:
        from rich.console import Console

        from poprisk_integrations.cli.flips_table import print_pairs

        console = Console()
        lines = [str(report), _noise_line(noise), None if found is None else str(found)]
        _say(console, lines)
        if pairs:
            swapped = None if swapped_rows is None else [p["row"] in swapped_rows for p in pairs]
            print_pairs(console, pairs, examples, swapped)
        last = str(figure) if drawn else _no_figure(report)
        _say(console, [_next_line(report, args), _written_line(written), last])
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= 0")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} must be in [0, 1]")
    return value


def _check_arguments(args: argparse.Namespace) -> None:
    if args.figure is not None and not args.figure.parent.is_dir():
        raise UsageError(f"Invalid --figure: {str(args.figure)!r}. Its directory does not exist.")
    if args.dataset is None and (args.write is not None or args.id_column is not None):
        option = "--write" if args.write is not None else "--id-column"
        raise UsageError(f"{option} needs --dataset: the data that the trainer got.")
    if args.write is None:
        if args.mode is not None or args.force:
            raise UsageError(f"{'--mode' if args.mode else '--force'} is for --write.")
        return
    out = args.write
    if args.mode == "suggested" and args.min_probability is not None:
        raise UsageError("--mode suggested goes by the report's actions: no --min-probability.")
    if out.suffix not in _SUFFIXES:
        raise UsageError(f"Invalid --write: {str(out)!r}. Must end in {', '.join(_SUFFIXES)}.")
    if not out.parent.is_dir():
        raise UsageError(f"Invalid --write: {str(out)!r}. Its directory does not exist.")
    if out.is_dir() or (out.exists() and not args.force):
        raise UsageError(f"Invalid --write: {str(out)!r} exists (--force replaces a file).")


def _load_noise(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        noise = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        noise = None
    if not isinstance(noise, dict):
        raise UsageError(f"{str(path)!r} is no estimate of a noise rate.")
    return noise


def _load_data(
    args: argparse.Namespace, report: "FlipReport", swapped_rows: set[int]
) -> tuple["Dataset", list[int]]:
    """The pairs as the trainer got them, and the row of each pair of the report."""
    from datasets import disable_progress_bars
    from trl import DatasetMixtureConfig, ScriptArguments

    from poprisk_integrations.cli.flips_data import match_rows, swap_labels
    from poprisk_integrations.cli.preference_data import load_preferences

    if args.quiet or args.json:
        disable_progress_bars()
    script = ScriptArguments(
        dataset_name=args.dataset,
        dataset_config=args.dataset_config,
        dataset_train_split=args.split,
    )
    dataset, _ = load_preferences(script, DatasetMixtureConfig(), evaluate=False)
    rows = match_rows(report, dataset, args.id_column)
    numbers = report.to_pandas()["row"].tolist()
    swapped = {row for row, number in zip(rows, numbers, strict=True) if number in swapped_rows}
    return swap_labels(dataset, swapped), rows


def _examples(dataset: "Dataset", rows: list[int]) -> list[dict[str, Any]]:
    names = [name for name in _TEXTS if name in dataset.column_names]
    texts = dataset.select_columns(names)
    return [texts[row] for row in rows]


def _write(
    args: argparse.Namespace, report: "FlipReport", dataset: "Dataset", rows: list[int]
) -> dict[str, Any]:
    """Write the cleaned data; what was done."""
    from poprisk_integrations.cli.flips_data import (
        columns_of_one_side,
        plan_cleaning,
        swap_labels,
        write_data,
    )
    from poprisk_integrations.trl.flip_report import DROP_AT

    mode = args.mode or "drop"
    if not report.calibrated and mode != "suggested" and args.min_probability is None:
        raise UsageError(
            "The report ranks the pairs; how many labels are wrong is not known, so there is no "
            "place to cut: say where with --min-probability."
        )
    threshold = DROP_AT if args.min_probability is None else args.min_probability
    drop, swap = plan_cleaning(report, rows, mode=mode, min_probability=threshold)
    cleaned = swap_labels(dataset, swap)
    if drop:
        cleaned = cleaned.select([row for row in range(len(cleaned)) if row not in drop])
    write_data(cleaned, args.write)
    return {
        "path": str(args.write),
        "mode": mode,
        "min_probability": None if mode == "suggested" else threshold,
        "pairs": len(cleaned),
        "dropped": len(drop),
        "swapped": len(swap),
        "columns_not_swapped": columns_of_one_side(dataset) if swap else [],
    }


def _draw(report: "FlipReport", path: Path, title: str, swapped_rows: set[int] | None) -> bool:
    """Draw and write; False where there is nothing to draw, or nothing to draw with."""
    if not report.summary()["num_scored"] or find_spec("matplotlib") is None:
        return False
    from poprisk_integrations.cli.flips_figure import draw_flips

    figure = draw_flips(report, title, swapped_rows)
    with write_whole(path) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _no_figure(report: "FlipReport") -> str:
    if not report.summary()["num_scored"]:
        return "No picture: no pair has a probability."
    return "No picture: matplotlib not found. Run: pip install 'poprisk_integrations[demo]'"


def _noise_line(noise: dict[str, Any] | None) -> str | None:
    if noise is None:
        return None
    rate, low, high, pairs = (_number(noise, n) for n in ("rate", "low", "high", "num_pairs"))
    if low is None or high is None or pairs is None:  # given by the user, or of another method
        return "noise rate not estimated" if rate is None else f"{_percent(rate)} look wrong"
    from poprisk_integrations.core.noise_rate import WIDEST, NoiseRateEstimate

    estimate = NoiseRateEstimate(
        rate=rate if high - low <= WIDEST else None,  # earlier versions named one in any case
        low=low,
        high=high,
        num_pairs=int(pairs),
        **dict.fromkeys(("reference_rate", "slope", "upper_bound", "anchor"), 0.0),
        num_not_judged=0,
    )
    return str(estimate)


def _number(noise: dict[str, Any], name: str) -> float | None:
    value = noise.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} % of the labels"


def _next_line(report: "FlipReport", args: argparse.Namespace) -> str | None:
    """What to do about the pairs that were shown."""
    if args.write is not None or not report.summary()["num_scored"]:
        return None
    table = report.to_pandas()
    data = shlex.quote(args.dataset or "DATA")
    if args.id_column or table["pair_id"].tolist() != table["row"].tolist():
        data += f" --id-column {shlex.quote(args.id_column or 'NAME')}"
    write = f"--dataset {data} --write clean.jsonl --min-probability"
    if not report.calibrated:
        return (
            "P(wrong) ranks the pairs and is no probability here, since the noise rate is not "
            "known. Next: look at the pairs above before you change anything; margins out of fold "
            f"(cross_fit_flip_report) judge better. To leave out the top all the same: {write} P"
        )
    return f"Next: look at the pairs above; to leave out the surest: {write} 0.9"


def _written_line(written: dict[str, Any] | None) -> str | None:
    if written is None:
        return None
    line = (
        f"{written['path']}: {written['pairs']} pairs, {written['dropped']} dropped, "
        f"{written['swapped']} swapped"
    )
    kept = written["columns_not_swapped"]
    return f"{line}; {', '.join(kept)} not swapped" if kept else line


def _say(console: Any, lines: list[str | None]) -> None:
    for line in lines:
        if line is not None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
