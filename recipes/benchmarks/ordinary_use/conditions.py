"""The conditions: data, model, wrong labels, optimizer, rate, schedule, epochs, batch."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ordinary_use.data import Task
from benchmarks.ordinary_use.preferences import preferences
from benchmarks.ordinary_use.texts import language, sparse_text, text_classes
from benchmarks.ordinary_use.vectors import diabetes, digits, mixture, table

__all__ = ["CONDITIONS", "Condition"]

NEEDS_FOLDER = (language, preferences)  # of pretrained weights


@dataclass(frozen=True)
class Condition:
    """One set-up that a user might train."""

    name: str  # for tables and folders
    _: KW_ONLY
    data: Callable[..., Task]  # makes the task from (seed, n, share, kind) and `options`
    n: int  # training examples
    share: float = 0.0  # of wrong labels, in training and noisy test data
    kind: str = "symmetric"  # of wrong labels
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of `data`
    optimizer: str = "AdamW"  # "AdamW", "PopRiskAdamW" or "SGD" (momentum 0.9)
    lr: float = 1e-3  # peak learning rate
    # "constant", "linear", "cosine" (a tenth warm-up), "onecycle" or "plateau".
    schedule: str = "constant"
    epochs: int = 30  # planned passes
    batch: int = 32  # examples of a step
    # "design": may be looked at while choosing an estimator; "confirm": only afterwards.
    half: str = "design"
    cooled: tuple[int, ...] = ()  # epochs from which cooling down is tried; empty: see `cool_from`
    weight_decay: float = 0.01  # decoupled; SGD 1e-4

    @property
    def cool_from(self) -> tuple[int, ...]:
        """Epochs from which cooling down is tried: by steps of about 40 %, where not named."""
        if self.cooled:
            return self.cooled
        grid = (round(2 ** (k / 2)) for k in range(20))
        return tuple(sorted({epoch for epoch in grid if epoch < self.epochs}))

    def task(self, seed: int, folder: Path) -> Task:
        """Data and model of one seed; `folder` keeps pretrained weights."""
        make = self.data
        if self.data in NEEDS_FOLDER:
            make = partial(make, folder=folder / "pretrained")
        return make(seed=seed, n=self.n, share=self.share, kind=self.kind, **self.options)


CNN, CODE = {"model": "cnn"}, {"text": "code", "start": "pretrained"}
_digits = partial(Condition, data=digits, share=0.3)
_cnn = partial(_digits, options=CNN)
_cancer = partial(Condition, data=table, n=340, options={"name": "breast_cancer"})
_snippets = partial(Condition, data=text_classes, n=1500)
_mixture = partial(Condition, data=mixture, n=10_000, share=0.3)
_language = partial(Condition, data=language, kind="tokens", lr=2e-3, batch=16)
_tuned = partial(_language, n=3000, options=CODE, epochs=3, cooled=(2,))
_pairs = partial(Condition, data=preferences, n=2000, kind="swapped", weight_decay=0.0)

_LIST = (
    # Digits. Few examples, wrong labels, constant rate: the end overfits.
    _digits("digits-mlp-400", n=400, epochs=100),
    _cnn("digits-cnn-1300", n=1300),
    _cnn("digits-cnn-600-pair", n=600, kind="pair", schedule="plateau", epochs=60, half="confirm"),
    # The schedule averages the noise away.
    _digits("digits-mlp-1200-onecycle", n=1200, lr=3e-3, schedule="onecycle"),
    _cnn("digits-cnn-1200-cosine", n=1200, lr=2e-3, schedule="cosine", half="confirm"),
    _digits(
        "digits-cnn-1300-shift-dropout-sgd",
        n=1300,
        share=0.1,
        options={**CNN, "dropout": 0.25, "shift": True},
        optimizer="SGD",
        lr=0.05,
        schedule="cosine",
        half="confirm",
    ),
    _digits(
        "digits-mlp-1200-large-batch",
        n=1200,
        share=0.15,
        kind="class",
        optimizer="PopRiskAdamW",
        lr=3e-3,
        batch=240,
        epochs=60,
    ),
    _digits(
        "digits-mlp-1200-clean", n=1200, share=0.0, schedule="linear", epochs=10, half="confirm"
    ),
    # Tables.
    _cancer("breast-cancer-340", share=0.3, epochs=100, half="confirm"),
    _cancer("breast-cancer-340-clean", optimizer="PopRiskAdamW", epochs=30),
    Condition(
        "wine-120",
        data=table,
        n=120,
        share=0.1,
        options={"name": "wine"},
        schedule="linear",
        epochs=100,
        batch=16,
        half="confirm",
    ),
    Condition("diabetes-330", data=diabetes, n=330, share=0.1, kind="exchanged", epochs=100),
    # Text.
    Condition("sparse-text-440", data=sparse_text, n=440),
    Condition(
        "sparse-text-1500-class",
        data=sparse_text,
        n=1500,
        share=0.15,
        kind="class",
        lr=3e-3,
        schedule="linear",
        epochs=10,
        half="confirm",
    ),
    _snippets("text-bag-1500", share=0.1, options={"model": "bag"}, lr=3e-3, schedule="plateau"),
    _snippets(
        "text-transformer-1500",
        options={"model": "transformer"},
        schedule="cosine",
        epochs=8,
        half="confirm",
        cooled=(2, 4, 6),
    ),
    # Many examples.
    _mixture("mixture-10000", batch=64),
    _mixture("mixture-3000-sgd", n=3000, share=0.1, kind="class", optimizer="SGD", lr=0.05),
    _mixture(
        "mixture-10000-4-epochs",
        optimizer="SGD",
        lr=0.3,
        schedule="onecycle",
        epochs=4,
        batch=512,
        half="confirm",
    ),
    # Language models.
    _language("lm-scratch-2000", n=2000, options={"test": 1200}, epochs=12, cooled=(3, 5, 8)),
    _tuned("lm-tune-3000-3-epochs", schedule="cosine", half="confirm"),
    _tuned(
        "lm-tune-1000-4-epochs",
        n=1000,
        share=0.1,
        options={**CODE, "test": 1000},
        schedule="linear",
        epochs=4,
        cooled=(1, 3),
    ),
    _tuned(
        "lora-3000-3-epochs",
        options={**CODE, "rank": 8},
        lr=1e-2,
        schedule="cosine",
        half="confirm",
        weight_decay=0.0,
    ),
    # Preferences.
    _pairs("dpo-swapped-6-epochs", share=0.3, epochs=6),
    _pairs("dpo-swapped-3-epochs-linear", share=0.3, schedule="linear", epochs=3, half="confirm"),
    _pairs("dpo-clean-3-epochs", schedule="linear", epochs=3, half="confirm"),
    _pairs("dpo-weak-2-epochs", kind="weak", schedule="cosine", epochs=2),
)
CONDITIONS = {condition.name: condition for condition in _LIST}
