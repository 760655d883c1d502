"""Reward model on preferences with wrong labels: how many, which, and a stop without an eval set.

Usage: python train.py --config config.yaml [--key value ...]

Keys are those of `trl reward` and of PopRiskRewardConfig, and `flip_rate`, `flip_seed`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from poprisk_integrations.cli.builtin import is_builtin, load_pairs, local_model
from poprisk_integrations.trl import PopRiskRewardConfig, PopRiskRewardTrainer
from poprisk_integrations.trl.label_flips import flip_preferences
from poprisk_integrations.trl.pair_scan import scan_pairs
from poprisk_integrations.trl.pairs import drop_rows, source_rows


@dataclass
class FlipArguments:
    """Labels that are swapped on purpose, so that a run can be judged against what is true."""

    flip_rate: float = field(
        default=0.0, metadata={"help": "Share of the training pairs whose labels are swapped."}
    )
    flip_seed: int = field(default=0, metadata={"help": "Seed that draws these pairs."})


def load(args: ScriptArguments) -> DatasetDict:
    """The data set of that name, as `trl reward` loads it, or the built-in one."""
    if is_builtin(args.dataset_name):
        return load_pairs(args.dataset_name)
    return load_dataset(args.dataset_name, name=args.dataset_config)


def usable(pairs: Dataset) -> Dataset:
    """Without pairs that express no preference; the others know which row they were."""
    scan = scan_pairs(pairs)
    return drop_rows(pairs, {*scan.empty, *scan.identical})


def parse(argv: list[str] | None = None):
    """Data, training, model and flips from a YAML file and the command line."""
    types = (ScriptArguments, PopRiskRewardConfig, ModelConfig, FlipArguments)
    return TrlParser(types).parse_args_and_config(argv)


def main(argv: list[str] | None = None) -> PopRiskRewardTrainer:
    """Train, save the model, and note which labels were swapped."""
    data, args, model, flips = parse(argv)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    splits = load(data)
    train, rows = flip_preferences(
        usable(splits[data.dataset_train_split]), flips.flip_rate, flips.flip_seed
    )
    evaluation = None
    if args.eval_strategy != "no":
        evaluation = usable(splits[data.dataset_test_split])
    trainer = PopRiskRewardTrainer(
        model=local_model(model.model_name_or_path, Path(args.output_dir)),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero() and rows:
        numbers = source_rows(train)
        record = {
            "flip_rate": flips.flip_rate,
            "flip_seed": flips.flip_seed,
            "num_pairs": len(train),
            "num_flipped": len(rows),
            "rows": [numbers[row] for row in rows],
        }
        Path(args.output_dir, "label_flips.json").write_text(json.dumps(record) + "\n")
    trainer.accelerator.print(f"which labels look wrong: poprisk flips {args.output_dir}")
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
