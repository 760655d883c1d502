"""`poprisk dpo`: DPO on preference data, from a config."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.output import writing

if TYPE_CHECKING:
    from poprisk_integrations.cli.dpo_config import DPOArguments
    from poprisk_integrations.trl import PopRiskDPOTrainer

__all__ = [
    "LABEL_FLIPS",
    "Pairs",
    "add_parser",
    "build_trainer",
    "load_pairs",
    "record",
    "run",
    "train_and_save",
    "trainer_of",
]

LABEL_FLIPS = "label_flips.json"  # which labels were swapped on purpose


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dpo` to the command line."""
    parser = subparsers.add_parser(
        "dpo",
        help="DPO from a config",
        usage="poprisk dpo --config CONFIG.yaml [--KEY VALUE ...]",
        description="Trains a model on preference pairs. A config has the keys of `trl dpo`, those "
        "of PopRiskDPOConfig, and flip_rate, which swaps the labels of that share of the training "
        "pairs for studies. A key on the command line wins over the file. It runs in this "
        "process; for several: `accelerate launch -m poprisk_integrations.cli dpo --config ...`.",
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", action="store_true", help="show every key and its default")
    # All that this parser does not know goes to TRL's own, as it is.
    parser.set_defaults(run=run, rest=[])


def run(args: argparse.Namespace) -> int:
    """Train, save the model, say how it ended."""
    require("transformers", "datasets", "trl", "peft", extra="trl")
    from poprisk_integrations.cli.dpo_config import config_help, parse_config

    if args.help_all:
        print(config_help())
        return 0
    config = parse_config(args.rest)
    if config.pairs.eval_dataset_name is not None and config.training.eval_strategy == "no":
        raise UsageError("eval_dataset_name needs eval_strategy: steps, or epoch")
    trainer = build_trainer(config)
    checkpoint = _checkpoint(config.training)
    return train_and_save(trainer, config, checkpoint, debug=args.debug)


@dataclass(frozen=True)
class Pairs:
    """What a config trains and evaluates on, and what was changed on the way (None for nothing)."""

    train: Any
    evaluation: Any
    dropped: dict[str, Any] | None
    flips: dict[str, Any] | None

    def note(self, directory: Path) -> None:
        """Write down what was changed, and say how many labels were swapped."""
        record(directory / "dropped_pairs.json", self.dropped)
        record(directory / LABEL_FLIPS, self.flips)
        if self.flips is not None:
            print(
                f"{self.flips['num_flipped']} of {self.flips['num_pairs']} training labels swapped"
            )


def build_trainer(config: "DPOArguments") -> "PopRiskDPOTrainer":
    """Load model and data, change the pairs as asked, and note that in the output directory."""
    from poprisk_integrations.trl.validation import check_output_dir

    output_dir = Path(str(config.training.output_dir))
    check_output_dir(output_dir)
    pairs = load_pairs(config)
    trainer = trainer_of(config, pairs.train, pairs.evaluation)
    if trainer.is_world_process_zero():
        pairs.note(output_dir)
    return trainer


def load_pairs(config: "DPOArguments") -> Pairs:
    """The data of a config, without unusable pairs and with labels swapped, as it asks."""
    from datasets import Dataset

    from poprisk_integrations.cli.preference_data import load_preferences

    training, options = config.training, config.pairs
    weights = training.pair_weight_column
    train, evaluation = load_preferences(
        config.script,
        config.mixture,
        evaluate=training.eval_strategy != "no",
        eval_name=options.eval_dataset_name,
        number_columns=() if weights is None else (weights,),
    )
    if (options.flip_rate or options.drop_unusable_pairs) and not isinstance(train, Dataset):
        raise UsageError("flip_rate and drop_unusable_pairs need data that are not streamed")
    dropped = None
    if options.drop_unusable_pairs:
        train, dropped = _drop_unusable(train, "train_dataset")
        if evaluation is not None:
            evaluation, _ = _drop_unusable(evaluation, "eval_dataset")
    train, flips = _flip(config, train)
    return Pairs(train, evaluation, dropped, flips)


def trainer_of(config: "DPOArguments", train: Any, evaluation: Any) -> "PopRiskDPOTrainer":
    """A trainer of the config's model, on a fresh copy of it."""
    import torch
    from trl import get_peft_config, get_quantization_config

    from poprisk_integrations.cli.builtin import local_model
    from poprisk_integrations.trl import PopRiskDPOTrainer

    training, model = config.training, config.model
    init_kwargs: Any = training.model_init_kwargs or {}
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **init_kwargs,
    }
    try:
        trainer = PopRiskDPOTrainer(
            model=local_model(str(model.model_name_or_path), Path(str(training.output_dir))),
            args=training,
            train_dataset=train,
            eval_dataset=evaluation,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except OSError as error:  # transformers: no such model
        raise UsageError(one_line(error)) from error
    if config.script.ignore_bias_buffers:
        # As `trl dpo` does: DDP cannot broadcast boolean buffers on some backends.
        network: Any = trainer.model
        network._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in network.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def _drop_unusable(dataset: Any, name: str) -> tuple[Any, dict[str, Any] | None]:
    """The data without pairs that express no preference, and which these were (None for none)."""
    from poprisk_integrations.trl.pair_scan import scan_pairs
    from poprisk_integrations.trl.pairs import drop_rows

    scan = scan_pairs(dataset, name)
    empty = sorted(scan.empty + scan.unanswered)
    dropped = {*empty, *scan.identical}
    if not dropped:
        return dataset, None
    if len(dropped) == len(dataset):
        raise UsageError(f"{name}: none of its {len(dataset)} pairs expresses a preference")
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {len(empty)} empty and {len(scan.identical)} identical pairs left out")
    record = {"num_pairs": len(dataset), "empty": empty, "identical": scan.identical}
    return drop_rows(dataset, dropped), record


def _flip(config: "DPOArguments", train: Any) -> tuple[Any, dict[str, Any] | None]:
    """The training data with swapped labels, and the record of it (None without swaps)."""
    from poprisk_integrations.trl.label_flips import flip_preferences
    from poprisk_integrations.trl.pairs import source_rows
    from poprisk_integrations.trl.validation import check_preferences

    rate, seed = config.pairs.flip_rate, config.pairs.flip_seed
    if rate == 0:
        return train, None
    check_preferences(train, strict=config.training.noise != "off")
    number = source_rows(train)  # of the data as they were read
    train, rows = flip_preferences(train, rate, seed)
    return train, {
        "flip_rate": rate,
        "flip_seed": seed,
        "num_pairs": len(train),
        "num_flipped": len(rows),
        "rows": [number[row] for row in rows],
    }


def record(path: Path, content: dict[str, Any] | None) -> None:
    """Write a file of JSON, or see to it that there is none."""
    if content is None:
        path.unlink(missing_ok=True)  # of an earlier run: it would be taken for this one's
        return
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _checkpoint(training: Any) -> Any:
    """Which checkpoint to resume from; of `true` the newest that no kill has left half-written."""
    from poprisk_integrations.huggingface import last_whole_checkpoint
    from poprisk_integrations.trl.label_noise_callback import LABELS_FILE

    if training.resume_from_checkpoint not in (True, "true", "True"):
        return training.resume_from_checkpoint
    found = last_whole_checkpoint(training.output_dir, also=[LABELS_FILE])
    if found is None:
        raise UsageError(
            "Invalid resume_from_checkpoint: true. There is no whole checkpoint in "
            f"{str(training.output_dir)!r}."
        )
    return found


def train_and_save(
    trainer: "PopRiskDPOTrainer", config: "DPOArguments", checkpoint: Any, *, debug: bool
) -> int:
    """Once the steps are done, what fails keeps nothing that follows from being saved."""
    output_dir, data = config.training.output_dir, config.script.dataset_name
    after: dict[str, Callable[[], Any]] = {
        "model": lambda: trainer.save_model(output_dir),
        "trainer state": trainer.save_state,
    }
    saved = list(after)
    if config.training.push_to_hub:
        after["push to the hub"] = lambda: trainer.push_to_hub(dataset_name=data)
    after["summary"] = lambda: _report(trainer, config)
    if hasattr(trainer, "end"):  # transformers >= 5.18: closes trackers and the process group
        after["end of the trainer"] = trainer.end
    failed: dict[str, Exception] = {}
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        state = trainer.state
        is_over = state.global_step >= state.max_steps or trainer.control.should_training_stop
        if not (state.global_step and is_over):
            raise
        failed["end of training"] = error
    for what, call in after.items():  # each for itself: hours of training are at stake
        try:
            call()
        except Exception as error:
            failed[what] = error
    if not failed:
        return 0
    for fault in failed.values() if debug else ():
        traceback.print_exception(fault)
    saved = [what for what in saved if what not in failed]
    kept = f"saved in {str(output_dir)!r}: {' and '.join(saved)}" if saved else "nothing saved"
    reasons = "; ".join(f"{what}: {one_line(fault)}" for what, fault in failed.items())
    print(f"poprisk: trained; {kept}; failed: {reasons}", file=sys.stderr)
    return 1


def _report(trainer: "PopRiskDPOTrainer", config: "DPOArguments") -> None:
    from poprisk_integrations.cli.clean import cleaning_of
    from poprisk_integrations.cli.flips.arguments import flips_command
    from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback

    if not trainer.is_world_process_zero():
        return
    state = trainer.state
    print(f"{state.global_step} of {state.max_steps} steps; model in {trainer.args.output_dir}")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PopRiskEarlyStoppingCallback):
            print(f"stop: {callback.stopping_state['reason']}; {callback.diagnosis}")
    try:
        report = trainer.flip_report()
    except ValueError:  # streamed data, or too few pairs
        return
    script = config.script
    command = flips_command(
        Path(str(config.training.output_dir)),
        script.dataset_name,
        id_column=config.training.pair_id_column,
        config=script.dataset_config,
        split=script.dataset_train_split,
    )
    cleaned = cleaning_of(Path(str(config.training.output_dir))) is not None
    print(f"labels: {report.advice(command, cleaned=cleaned)}")
