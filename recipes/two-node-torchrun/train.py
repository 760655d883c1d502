"""Supervised fine-tuning that stops without validation data (TRL's SFTTrainer).

Usage: python train.py --config config.yaml [--key value ...]

Keys are those of `trl sft`, and `stop_criterion`, `stop_sit_out`, `stop_patience`, `stop_action`,
`stop_kappa`, `stop_window` of the stop.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from poprisk_integrations.cli.builtin import local_model
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback  # registers the names

BUNDLED = "bundled:word-lists"
# fmt: off
WORDS = (
    "arc", "ash", "bay", "bud", "cat", "cup", "den", "dew", "elm", "fog", "gum", "hay", "ice",
    "jay", "kin", "lot", "map", "net", "oak", "pea", "rye", "sea", "tin", "urn", "vow", "wax",
    "yam", "zoo",
)
# fmt: on


@dataclass
class StopArguments:
    """Settings of the stop, see PopRiskEarlyStoppingCallback."""

    stop_criterion: str = field(
        default="auto",
        metadata={"help": '"risk" (the estimated test loss), "signal", or "auto".'},
    )
    stop_sit_out: float = field(
        default=0.15,
        metadata={"help": "Share of the texts that join late and are only measured before."},
    )
    stop_patience: int = field(
        default=10, metadata={"help": "Windows without a smaller estimate before the stop."}
    )
    stop_action: str | None = field(
        default=None,
        metadata={"help": '"cooldown", "stop", or "monitor" to log and end nothing.'},
    )
    stop_kappa: float = field(
        default=2.0,
        metadata={"help": 'Of "signal": stop at this multiple of the training time of the onset.'},
    )
    stop_window: str = field(
        default="auto", metadata={"help": 'Of "signal": optimizer steps per window, or "auto".'}
    )


def word_lists(rows: int, wrong: float, seed: int) -> Dataset:
    """Lists of words in the order of the alphabet; so many of the words are wrong."""
    draw = random.Random(seed)
    texts = []
    for _ in range(rows):
        start = draw.randrange(len(WORDS))
        words = [WORDS[(start + place) % len(WORDS)] for place in range(20)]
        texts.append(" ".join(draw.choice(WORDS) if draw.random() < wrong else w for w in words))
    return Dataset.from_dict({"text": texts})


def load_texts(args: ScriptArguments) -> DatasetDict:
    """The data set of that name, as `trl sft` loads it, or the bundled one."""
    if args.dataset_name == BUNDLED:
        return DatasetDict(train=word_lists(128, 0.3, seed=0), test=word_lists(32, 0.0, seed=1))
    return load_dataset(
        args.dataset_name, name=args.dataset_config, streaming=args.dataset_streaming
    )


def checkpoint(args: SFTConfig) -> str | None:
    """What to resume from; "last" is the newest checkpoint in `output_dir`, if there is one."""
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None


def parse(argv: list[str] | None = None):
    """Data, training, model and stop from a YAML file and the command line."""
    types = (ScriptArguments, SFTConfig, ModelConfig, StopArguments)
    return TrlParser(types).parse_args_and_config(argv)


def main(argv: list[str] | None = None) -> SFTTrainer:
    """Train to the stop, save the model, and evaluate it where there is something to."""
    data_args, args, model_args, stop = parse(argv)
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    texts = load_texts(data_args)
    test = texts.get(data_args.dataset_test_split)
    trainer = SFTTrainer(
        model=local_model(model_args.model_name_or_path, Path(args.output_dir)),
        args=args,
        train_dataset=texts[data_args.dataset_train_split],
        eval_dataset=test,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[
            PopRiskEarlyStoppingCallback(
                criterion=stop.stop_criterion,
                sit_out=stop.stop_sit_out,
                patience=stop.stop_patience,
                action=stop.stop_action,
                kappa=stop.stop_kappa,
                window="auto" if stop.stop_window == "auto" else int(stop.stop_window),
            )
        ],
    )
    trainer.train(resume_from_checkpoint=checkpoint(args))
    trainer.save_model()
    if test is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    trainer.accelerator.print(f"the picture of why: poprisk report {args.output_dir}")
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
