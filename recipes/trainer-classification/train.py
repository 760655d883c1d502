"""Text classification with `optim="poprisk_adamw"` and the stop (Hugging Face Trainer).

Usage: python train.py --config config.yaml [--key value ...]

Keys are those of TrainingArguments and of TextArguments below.
"""

import argparse
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from bundled import MODEL, REVIEWS, reviews, tiny_bert
from datasets import ClassLabel, DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback  # registers the names


@dataclass
class TextArguments:
    """What is trained on what."""

    model_name_or_path: str = field(
        default=MODEL, metadata={"help": f"A model of the Hub or a directory, or {MODEL}."}
    )
    dataset_name: str = field(
        default=REVIEWS, metadata={"help": f"A data set of the Hub or a directory, or {REVIEWS}."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "E.g. sst2 of GLUE."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})
    wrong_labels: float = field(
        default=0.0,
        metadata={"help": "Share of the training labels replaced by another one, for studies."},
    )
    stop: bool = field(default=True, metadata={"help": "Stop without validation data."})
    stop_criterion: str = field(
        default="auto",
        metadata={"help": "'risk': the estimated test loss; 'signal': F; 'auto': risk if it can."},
    )
    stop_kappa: float = field(
        default=2.0, metadata={"help": "Of 'signal': stop at this multiple of the onset's time."}
    )


def parse(argv: list[str]) -> tuple[TextArguments, TrainingArguments]:
    """From a YAML file and the command line, which wins."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    found, rest = files.parse_known_args(argv)
    parser = HfArgumentParser((TextArguments, TrainingArguments))
    if found.config is not None:
        values = yaml.safe_load(found.config.read_text(encoding="utf-8"))
        unknown = values.keys() - {action.dest for action in parser._actions}
        if unknown:
            parser.error(f"unknown keys in {found.config}: {', '.join(sorted(unknown))}")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(args=rest)


def load_texts(args: TextArguments, seed: int) -> tuple[DatasetDict, list[str]]:
    """Texts to train on and to evaluate on, and the names of their classes."""
    if args.dataset_name == REVIEWS:
        texts = reviews()
    else:
        texts = load_dataset(args.dataset_name, args.dataset_config)
    texts = DatasetDict(train=texts[args.train_split], test=texts[args.test_split])
    columns = {args.text_column: "text", args.label_column: "labels"}
    texts = texts.select_columns(list(columns)).rename_columns(
        {old: new for old, new in columns.items() if old != new}
    )
    if not isinstance(texts["train"].features["labels"], ClassLabel):
        texts = texts.class_encode_column("labels")
    feature = texts["train"].features["labels"]
    draw, count = random.Random(seed), feature.num_classes
    noisy = [
        (label + draw.randrange(1, count)) % count if draw.random() < args.wrong_labels else label
        for label in texts["train"]["labels"]
    ]
    train = texts["train"].remove_columns("labels")
    texts["train"] = train.add_column("labels", noisy, feature=feature)
    return texts, feature.names


def load_model(args: TextArguments, texts: DatasetDict, names: list[str]):
    """The model with a new head, and its tokenizer."""
    if args.model_name_or_path == MODEL:
        return tiny_bert(texts["train"]["text"], names)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return model, AutoTokenizer.from_pretrained(args.model_name_or_path)


def accuracy(prediction) -> dict[str, float]:
    """Share of right answers."""
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def main(argv: list[str]) -> Trainer:
    """Train to the stop, restore its checkpoint, save the model and evaluate it."""
    text_args, args = parse(argv)
    set_seed(args.seed)
    texts, names = load_texts(text_args, args.seed)
    model, tokenizer = load_model(text_args, texts, names)
    with args.main_process_first():
        tokens = texts.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=text_args.max_length),
            batched=True,
            remove_columns=["text"],
        )
    trainer = Trainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[
            PopRiskEarlyStoppingCallback(text_args.stop_criterion, kappa=text_args.stop_kappa)
        ]
        if text_args.stop
        else None,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.accelerator.print(f"best checkpoint: {trainer.state.best_model_checkpoint}")
    trainer.accelerator.print(f"the picture of why: poprisk report {args.output_dir}")
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
