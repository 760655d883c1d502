"""A classifier on the embeddings of a frozen model, in closed form, without validation data.

Usage: python train.py --config config.yaml [--key value ...]

Keys are those of Arguments below.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from bundled import DIGITS, digits
from datasets import ClassLabel, load_dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, HfArgumentParser


@dataclass
class Arguments:
    """What is embedded by what."""

    model_name_or_path: str = field(
        default=DIGITS, metadata={"help": f"An encoder of the Hub or a directory, or {DIGITS}."}
    )
    dataset_name: str = field(
        default=DIGITS, metadata={"help": f"A data set of the Hub or a directory, or {DIGITS}."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "E.g. sst2 of GLUE."})
    train_split: str = field(default="train", metadata={"help": "Split to learn from."})
    test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})
    batch_size: int = field(default=64, metadata={"help": "Texts that are embedded at a time."})
    wrong_labels: float = field(
        default=0.0,
        metadata={"help": "Share of the training labels replaced by another one, for studies."},
    )
    output_dir: str = field(default="out", metadata={"help": "Of the head and its report."})
    seed: int = field(default=0, metadata={"help": "Of the wrong labels."})


def parse(argv: list[str]) -> Arguments:
    """From a YAML file and the command line, which wins."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    found, rest = files.parse_known_args(argv)
    parser = HfArgumentParser(Arguments)
    if found.config is not None:
        values = yaml.safe_load(found.config.read_text(encoding="utf-8"))
        unknown = values.keys() - {action.dest for action in parser._actions}
        if unknown:
            parser.error(f"unknown keys in {found.config}: {', '.join(sorted(unknown))}")
        parser.set_defaults(**values)
    (args,) = parser.parse_args_into_dataclasses(args=rest)
    if (args.model_name_or_path == DIGITS) != (args.dataset_name == DIGITS):
        parser.error(f"{DIGITS} is model and data set together: name it for both, or for neither")
    if not 0 <= args.wrong_labels <= 1:
        parser.error(f"Invalid --wrong_labels: {args.wrong_labels}. From 0 to 1.")
    return args


@dataclass(frozen=True)
class Head:
    """Scores of the classes are `features @ weight + bias`."""

    weight: Tensor
    bias: Tensor
    strength: float
    left_out: Tensor  # the score of each training example by the head without it


def ridge(features: Tensor, labels: Tensor, classes: int) -> Head:
    """Ridge regression of one-hot labels; the strength with the smallest GCV.

    GCV(s) = |(I - H) y|^2 / n / (1 - tr H / n)^2, with the hat matrix H = X (X'X + s)^-1 X' and
    an intercept, which is one degree of freedom of H.
    """
    n, mean = len(features), features.mean(0).double()
    y = torch.nn.functional.one_hot(labels, classes).double()
    u, sizes, v = torch.linalg.svd(features.double() - mean, full_matrices=False)
    turned = u.T @ (y - y.mean(0))
    strengths = sizes.square().mean() * torch.logspace(-6, 3, 37, dtype=torch.float64)
    kept = sizes.square() / (sizes.square() + strengths[:, None])  # (strengths, directions)
    outside = (y - y.mean(0)).square().sum() - turned.square().sum()
    error = outside + (1 - kept).square() @ turned.square().sum(1)
    best = int((error / (n - 1 - kept.sum(1)).square()).argmin())
    hat = u.square() @ kept[best] + 1 / n  # H's diagonal
    fitted = u @ (kept[best][:, None] * turned) + y.mean(0)
    weight = v.T @ ((kept[best] / sizes.clamp_min(1e-300))[:, None] * turned)
    return Head(
        weight=weight,
        bias=y.mean(0) - mean @ weight,
        strength=float(strengths[best]),
        left_out=y - (y - fitted) / (1 - hat)[:, None],
    )


@torch.no_grad()
def embed(args: Arguments, texts: list[str]) -> Tensor:
    """Mean of the last hidden states over the tokens of each text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModel.from_pretrained(args.model_name_or_path).to(device).eval()
    found = []
    for first in range(0, len(texts), args.batch_size):
        batch = tokenizer(
            texts[first : first + args.batch_size],
            padding=True,
            truncation=True,
            max_length=args.max_length,
            return_tensors="pt",
        ).to(device)
        hidden = model(**batch).last_hidden_state.float()
        used = batch["attention_mask"][..., None]
        found.append(((hidden * used).sum(1) / used.sum(1)).cpu())
    return torch.cat(found)


def load_texts(args: Arguments) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Embeddings and labels of both splits, and the names of the classes."""
    data = load_dataset(args.dataset_name, args.dataset_config)
    if not isinstance(data[args.train_split].features[args.label_column], ClassLabel):
        data = data.class_encode_column(args.label_column)
    splits = [data[args.train_split], data[args.test_split]]
    features = [embed(args, list(split[args.text_column])) for split in splits]
    labels = [torch.tensor(list(split[args.label_column])) for split in splits]
    return features, labels, splits[0].features[args.label_column].names


def main(argv: list[str]) -> dict:
    """Embed, compute the head, save it and say how good it is."""
    args = parse(argv)
    load = digits if args.dataset_name == DIGITS else load_texts
    (x, test_x), (y, test_y), names = load(args)
    draw = random.Random(args.seed)
    wrong = draw.sample(range(len(y)), round(args.wrong_labels * len(y)))
    for row in wrong:
        y[row] = (y[row] + draw.randrange(1, len(names))) % len(names)
    began = time.monotonic()
    head = ridge(x, y, len(names))
    scores = test_x.double() @ head.weight + head.bias
    report = {
        "accuracy": float((scores.argmax(1) == test_y).float().mean()),
        "accuracy_left_out": float((head.left_out.argmax(1) == y).float().mean()),
        "strength": head.strength,
        "seconds": round(time.monotonic() - began, 3),
        "examples": len(y),
        "classes": names,
        **asdict(args),
    }
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {"weight": head.weight, "bias": head.bias}
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, out / "head.safetensors")
    (out / "head.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(
        f"{len(y)} examples, head in {report['seconds']} s: {report['accuracy']:.1%} of the test "
        f"labels right; leave-one-out on the training labels, wrong ones included: "
        f"{report['accuracy_left_out']:.1%}"
    )
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
