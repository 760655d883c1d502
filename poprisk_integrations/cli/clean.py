"""`poprisk clean`: finds wrong labels out of fold, and makes a model that has not fitted them."""

import argparse
import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError, at_least
from poprisk_integrations.cli.output import writing

if TYPE_CHECKING:
    from poprisk_integrations.cli.dpo import Pairs
    from poprisk_integrations.cli.dpo_config import DPOArguments

__all__ = ["CLEANING", "CLEAN_REPORT", "add_parser", "cleaning_of", "run"]

CLEANING = "cleaning"  # directory below output_dir: margins of the folds, flip report, cleaned data
CLEAN_REPORT = "poprisk_clean.json"
_DATA = "cleaned.parquet"
# Of the run itself; a fold has none of it.
_FOLD: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": [],
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "stop": False,
    "on_policy_kl_samples": 0,
    "auto_learning_rate": False,
    "resume_from_checkpoint": None,
}


def cleaning_of(directory: Path) -> Path | None:
    """Where `poprisk clean` left what it found: this directory or one below it; None where not."""
    places = (directory, directory / CLEANING)
    return next((place for place in places if (place / CLEAN_REPORT).is_file()), None)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `clean` to the command line."""
    parser = subparsers.add_parser(
        "clean",
        help="find wrong labels with models that never saw them, and make a better model",
        usage="poprisk clean --config CONFIG.yaml [--folds N] [--partitions N] [--final WHAT] "
        "[--mode MODE] [--KEY VALUE ...]",
        description="Trains the config's model once per fold on the other folds, and judges the "
        "pairs of the fold with it. The mean of these models, each of which has fitted other wrong "
        "labels, becomes the model; or, with --final retrain, one that is trained anew without the "
        "pairs whose label is probably wrong. Keys are those of `poprisk dpo`. What it finds is "
        f"kept in output_dir/{CLEANING}: the flip report, the cleaned data and what was done. A "
        "second call goes on where the first was cut. With flip_rate, which swaps labels on "
        "purpose, it says how many of these were found.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--folds",
        type=at_least(2),
        default=4,
        metavar="N",
        help="parts of the data; up to N - 1 trainings are the price (default: %(default)s)",
    )
    add(
        "--partitions",
        type=at_least(1),
        default=1,
        metavar="N",
        help="how often the data are divided anew, at the price of as many times the trainings; "
        "--folds 2 --partitions 6 finds more wrong labels for six trainings (default: %(default)s)",
    )
    add(
        "--mode",
        choices=("drop", "swap", "suggested"),
        default="drop",
        help="what happens to suspect pairs (default: %(default)s); suggested: swapped from "
        "P(wrong) = 0.9 on and left out from 0.5 on",
    )
    add(
        "--min-probability",
        type=float,
        metavar="P",
        help="from which P(wrong) on a pair is suspect (default: 0.5; nothing where the margins "
        "do not tell how many labels are wrong)",
    )
    add(
        "--final",
        choices=("mean", "retrain", "none"),
        default="mean",
        help="what becomes the model (default: %(default)s): the mean of the fold models, which "
        "needs no further training; one trained anew on the cleaned data; or none",
    )
    # All that this parser does not know goes to TRL's own, as it is.
    parser.set_defaults(run=run, rest=[])


def run(args: argparse.Namespace) -> int:
    """Judge, clean, train, and say what came of it."""
    require("transformers", "datasets", "trl", "peft", extra="trl")
    from accelerate import PartialState
    from datasets import Dataset

    from poprisk_integrations.cli.dpo import load_pairs, record, train_and_save, trainer_of
    from poprisk_integrations.cli.dpo_config import parse_config
    from poprisk_integrations.trl.cleaning import clean_pairs
    from poprisk_integrations.trl.validation import check_before_work, check_output_dir

    if not args.rest:
        raise UsageError("a config is missing: poprisk clean --config CONFIG.yaml")
    config = parse_config(args.rest)
    training = config.training
    if args.min_probability is not None and not 0.0 <= args.min_probability <= 1.0:
        raise UsageError(f"Invalid --min-probability: {args.min_probability}. Must be in [0, 1].")
    output_dir = Path(str(training.output_dir))
    check_output_dir(output_dir)
    pairs = load_pairs(config)
    if not isinstance(pairs.train, Dataset):
        raise UsageError("poprisk clean needs data that are not streamed")
    if args.folds > len(pairs.train):
        raise UsageError(f"Invalid --folds: {args.folds}. There are {len(pairs.train)} pairs.")
    check_before_work(training, pairs.train, pairs.evaluation)
    is_first = training.process_index == 0
    folder = output_dir / CLEANING
    settings = _settings(config, args)
    if is_first:
        pairs.note(output_dir)
        print(_price(config, args, len(pairs.train)))
    fitted = _judge(config, pairs, args, folder, settings)
    report, estimate = fitted.report, fitted.estimate
    cleaned = clean_pairs(pairs.train, report, mode=args.mode, min_probability=args.min_probability)
    found = {
        "settings": settings,
        "folds": args.folds,
        "partitions": args.partitions,
        "epochs": fitted.epochs,
        "final": args.final,
        "mode": args.mode,
        "min_probability": args.min_probability,
        "noise": estimate.to_json(),
        "num_pairs": len(pairs.train),
        "dropped": cleaned.dropped,
        "swapped": cleaned.swapped,
        "expected_wrong": cleaned.expected_wrong,
        "study": _study(report, pairs),
        "groups": _groups(report, pairs),
    }
    is_going_on = _is_going_on(folder / CLEAN_REPORT, found)
    PartialState().wait_for_everyone()  # each rank has read it before the first one writes
    if is_first:
        report.save(folder)
        record(folder / "label_flips.json", pairs.flips)  # so that `poprisk flips` knows them
        with writing(folder / _DATA) as temporary:
            _as_given(cleaned.dataset).to_parquet(str(temporary))
        record(folder / CLEAN_REPORT, found)
        for line in _lines(found, estimate, folder):
            print(line)
    if args.final == "none":
        return 0
    trainer = trainer_of(config, cleaned.dataset, pairs.evaluation)
    if args.final == "retrain":
        return train_and_save(trainer, config, _checkpoint(training, is_going_on), debug=args.debug)
    fitted.load_weights(trainer)
    trainer.save_model(training.output_dir)
    if is_first:
        epochs = ", ".join(map(str, fitted.epochs))
        print(f"mean of {len(fitted.epochs)} models after {epochs} epochs; model in {output_dir}")
    return 0


def _judge(
    config: "DPOArguments", pairs: "Pairs", args: argparse.Namespace, folder: Path, settings: str
) -> Any:
    from poprisk_integrations.cli.dpo import trainer_of
    from poprisk_integrations.trl.cross_fit import cross_fit

    training = config.training

    def make_trainer(train: Any, judged: Any) -> Any:
        own = copy.deepcopy(config)
        for name, value in _FOLD.items():
            setattr(own.training, name, value)
        own.training.output_dir = str(folder / "fold")
        return trainer_of(own, train, judged)

    found = cross_fit(
        make_trainer,
        pairs.train,
        pair_id_column=training.pair_id_column,
        folds=args.folds,
        partitions=args.partitions,
        seed=training.seed,
        directory=folder,
        key=settings,
        average_weights=args.final == "mean",
    )
    if training.process_index == 0:
        shutil.rmtree(folder / "fold", ignore_errors=True)
    return found


def _settings(config: "DPOArguments", args: argparse.Namespace) -> str:
    """Of what decides what the folds find, a digest."""
    options: Any = config.training  # transformers leaves `to_dict` untyped
    training = {
        name: value
        for name, value in options.to_dict().items()
        if name not in _FOLD and not name.endswith("dir") and "logging" not in name
    }
    found = [training, vars(config.model), args.folds]
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()


def _price(config: "DPOArguments", args: argparse.Namespace, pairs: int) -> str:
    training, folds = config.training, args.folds
    length = f"{training.num_train_epochs:g} epochs"
    if training.max_steps > 0:
        length = f"{training.max_steps} steps"
    judged = args.partitions * (folds - 1 if training.max_steps <= 0 else folds)
    times = f", {args.partitions} times" if args.partitions > 1 else ""
    rest = ", then the run itself" if args.final == "retrain" else ""
    return (
        f"{pairs} pairs in {folds} folds{times}: up to {judged} times the training of the config "
        f"({length}) to judge them{rest}"
    )


def _study(report: Any, pairs: "Pairs") -> dict[str, Any] | None:
    """How many labels that were swapped on purpose were found; None where none were."""
    from poprisk_integrations.cli.flips.study import flips_found

    return None if pairs.flips is None else flips_found(report, set(pairs.flips["rows"]))


def _groups(report: Any, pairs: "Pairs") -> dict[str, Any]:
    """Suspects by annotator, if a column has a usual name for them, and by length."""
    from poprisk_integrations.cli.flips.groups import group_pairs
    from poprisk_integrations.trl.pair_scan import annotator_column_of
    from poprisk_integrations.trl.pairs import source_rows

    if not {"chosen", "rejected"} <= set(pairs.train.column_names):  # tokens alone
        return {}
    place_of = {row: place for place, row in enumerate(source_rows(pairs.train))}
    places = [place_of[row] for row in report.to_pandas()["row"]]
    return group_pairs(report, pairs.train, places, annotator_column_of(pairs.train))


def _lines(found: dict[str, Any], estimate: Any, folder: Path) -> list[str]:
    from poprisk_integrations.cli.flips.study import study_line

    lines = [str(estimate)]
    changed = {"left out": found["dropped"], "with their labels exchanged": found["swapped"]}
    done = " and ".join(f"{len(rows)} {what}" for what, rows in changed.items() if rows)
    if done:
        kept = found["expected_wrong"]
        rest = "" if kept is None else f"; of the rest {100 * kept:.0f} % are expected to be wrong"
        lines.append(f"{folder / _DATA}: of {found['num_pairs']} pairs {done}{rest}")
    elif estimate.rate is None and found["min_probability"] is None:
        lines.append(
            "no pair is left out: the ranking has no place to cut (--min-probability P cuts it)"
        )
    else:
        lines.append("no pair is suspect")
    if found["study"] is not None:
        lines.append(study_line(found["study"]))
    return lines


def _as_given(dataset: Any) -> Any:
    """Without the columns that are ours."""
    from poprisk_integrations.trl.pairs import PAIR_COLUMNS, SOURCE_COLUMN

    ours = [name for name in (*PAIR_COLUMNS, SOURCE_COLUMN) if name in dataset.column_names]
    return dataset.remove_columns(ours).with_format(None)


def _is_going_on(path: Path, found: dict[str, Any]) -> bool:
    """Whether an earlier call has cleaned the same data in the same way."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(before == json.loads(json.dumps(found)))


def _checkpoint(training: Any, is_going_on: bool) -> Any:
    """Where the training on the cleaned data was cut, or what the config says."""
    from poprisk_integrations.huggingface import last_whole_checkpoint
    from poprisk_integrations.trl.label_noise_callback import LABELS_FILE

    if training.resume_from_checkpoint not in (None, True, "true", "True"):
        return training.resume_from_checkpoint
    if not is_going_on:  # checkpoints there may be of other data
        return None
    return last_whole_checkpoint(training.output_dir, also=[LABELS_FILE])
