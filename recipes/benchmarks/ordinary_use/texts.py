"""Tasks on Python's own documentation and library: topics of snippets, language models."""

import itertools
import pydoc_data.topics
import sysconfig
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from benchmarks.ordinary_use.data import Examples, Task, class_loss, fit, pretrained
from benchmarks.ordinary_use.networks import Bag, Decoder, Encoder, add_lora, mlp
from benchmarks.ordinary_use.vectors import classification
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

__all__ = ["language", "pretrained_language_model", "sparse_text", "text_classes"]

CLASSES, SNIPPET = 10, 100  # topics and characters
FEATURES = 1024
CHARACTERS = 500_000  # of source code
VOCABULARY, LENGTH = 512, 40  # of the language models, in tokens
# Source code to fine-tune on: long modules without tables.
MODULES = (
    *("argparse", "ast", "asyncio/base_events", "bdb", "calendar", "cgitb", "codecs"),
    *("collections/__init__", "configparser", "copy", "csv", "dataclasses", "datetime", "decimal"),
    *("difflib", "dis", "doctest", "enum", "fractions", "ftplib", "functools", "gettext", "heapq"),
    *("http/client", "http/server", "imaplib", "inspect", "ipaddress", "locale"),
    *("logging/__init__", "mailbox", "nntplib", "ntpath", "optparse", "os", "pathlib", "pdb"),
    *("pickle", "pickletools", "platform", "plistlib", "posixpath", "pprint", "pydoc", "random"),
    *("shutil", "smtplib", "socket", "ssl", "statistics", "string", "subprocess", "tarfile"),
    *("tempfile", "textwrap", "threading", "tokenize", "traceback", "types", "typing"),
    *("unittest/case", "unittest/mock", "uuid", "xml/dom/minidom", "zipfile"),
)


@cache
def topics() -> dict[str, str]:
    """Topic by topic, without paragraphs that a longer topic has already."""
    seen: set[str] = set()
    found = {}
    for name, text in sorted(pydoc_data.topics.topics.items(), key=lambda item: -len(item[1])):
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                kept.append(words)
                seen.add(words)
        found[name] = "\n".join(kept)
    return found


@cache
def snippets() -> tuple[list[str], np.ndarray]:
    """Pieces of the ten longest topics, and which topic each is from."""
    longest = sorted(topics().items(), key=lambda item: -len(item[1]))[:CLASSES]
    texts, labels = [], []
    for label, (_, text) in enumerate(longest):
        for at in range(0, len(text) - SNIPPET + 1, SNIPPET):
            texts.append(text[at : at + SNIPPET])
            labels.append(label)
    return texts, np.array(labels)


@cache
def features() -> np.ndarray:
    """Counts of words and of pairs of words, hashed, each snippet of length one."""
    texts, _ = snippets()
    x = np.zeros((len(texts), FEATURES))
    for row, text in enumerate(texts):
        words = text.lower().split()
        for item in (*words, *map(" ".join, itertools.pairwise(words))):
            x[row, zlib.crc32(item.encode()) % FEATURES] += 1
    x = np.log1p(x)
    # Of the order of one per feature, as a standardised table would be.
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9) * 4


def sparse_text(seed: int, n: int, share: float, kind: str, width: int = 64) -> Task:
    """Which topic a snippet is from, by its words."""
    random = np.random.default_rng(2000 + seed)
    y = snippets()[1]
    order = random.permutation(len(y))
    make = mlp(FEATURES, width, CLASSES)
    return classification(features()[order], y[order], n, share, kind, random, make)


@cache
def snippet_tokens(vocabulary: int = 600, length: int = 48) -> Tensor:
    """Byte pairs of every snippet, padded with 0."""
    texts, _ = snippets()
    tokenizer = _byte_pairs(texts, vocabulary)
    rows = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text).ids[:length]
        rows[row, : len(ids)] = torch.tensor(ids) + 1
    return rows


def text_classes(seed: int, n: int, share: float, kind: str, model: str) -> Task:
    """The same from the tokens: a mean of embeddings, or a small transformer."""
    random = np.random.default_rng(2000 + seed)
    y = snippets()[1]
    order = random.permutation(len(y))
    x = snippet_tokens()[torch.tensor(order)]

    def make() -> nn.Module:
        if model == "bag":
            return Bag(601, CLASSES)
        return Encoder(601, x.shape[1], CLASSES)

    task = classification(x, y[order], n, share, kind, random, make)
    task.has_dropout = True
    return task


def language(
    seed: int,
    n: int,
    share: float,
    kind: str,
    folder: Path,
    text: str = "documentation",
    width: int = 64,
    start: str = "scratch",
    rank: int = 0,
    dropout: float = 0.0,
    test: int = 2000,
) -> Task:
    """Next tokens of windows of 40.

    Args:
        seed: Which windows, and the first weights.
        n: Windows to train on.
        share: Of the tokens, wrong in input and target.
        kind: "tokens".
        folder: Where the pretrained model is kept.
        text: "documentation" or "code".
        width: Of the model.
        start: "scratch" or "pretrained" (on the documentation).
        rank: Of LoRA adapters; 0 trains everything.
        dropout: In the blocks.
        test: Windows at most.
    """
    assert kind == "tokens"
    random = np.random.default_rng(3000 + seed)
    windows = token_windows(text)
    rows = torch.tensor(random.permutation(len(windows))[: n + test])
    clean = windows[rows]
    wrong = torch.tensor(random.random(clean.shape) < share)
    noisy = torch.where(wrong, torch.tensor(random.integers(0, VOCABULARY, clean.shape)), clean)

    def examples(part: Tensor) -> Examples:
        return Examples(x=(part[:, :-1],), y=part[:, 1:].contiguous())

    def make() -> nn.Module:
        decoder = Decoder(VOCABULARY, LENGTH, width, dropout=dropout)
        if start == "pretrained":
            decoder.load_state_dict(pretrained_language_model(folder, width))
        return add_lora(decoder, rank) if rank else decoder

    kept = examples(clean[n:])
    return Task(
        train=examples(noisy[:n]),
        clean=kept,
        noisy=examples(noisy[n:]) if share else kept,
        model=make,
        loss=class_loss,
    )


@cache
def tokenizer() -> Tokenizer:
    """One for documentation and code."""
    return _byte_pairs(["\n".join(topics().values()), _code()[:300_000]], VOCABULARY)


@cache
def token_windows(text: str) -> Tensor:
    """All windows that do not overlap, shape (N, 41)."""
    source = "\n".join(topics().values()) if text == "documentation" else _code()
    ids = torch.tensor(tokenizer().encode(source).ids)
    return ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)


def pretrained_language_model(folder: Path, width: int, epochs: int = 8) -> dict[str, Tensor]:
    """A model of the documentation, trained once."""

    def train() -> nn.Module:
        torch.manual_seed(7)
        windows = token_windows("documentation")
        model = Decoder(VOCABULARY, LENGTH, width)

        def loss(rows: Tensor) -> Tensor:
            part = windows[rows]
            return class_loss(model((part[:, :-1],)), part[:, 1:])[0].mean()

        fit(model, loss, examples=len(windows), batch=32, epochs=epochs)
        return model

    return pretrained(folder / f"documentation_{width}.pt", train)


@cache
def _code() -> str:
    """Source code of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [folder / f"{name}.py" for name in MODULES]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.exists())
    return text[:CHARACTERS]


def _byte_pairs(texts: list[str], vocabulary: int) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    return found
