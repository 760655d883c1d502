"""The arms: an optimizer, a loss on margins, and what happens to an update after the step.

A3, rDPO with an estimated noise rate, is E4 of `variants.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core.preference_losses import (
    conservative_dpo_loss,
    dpo_loss,
    holder_dpo_loss,
    robust_dpo_loss,
)

__all__ = ["ARMS", "Arm", "Context"]

CALIBRATED = 0.192
PULL = 3.0  # of C4, per unit of learning rate


@dataclass(kw_only=True)
class Context:
    """What a loss may know besides the margins. M members, B pairs of a batch, n pairs in all."""

    noise_rate: Tensor  # (M, 1), true share of wrong labels
    ledger: Tensor  # (M, n), margin before the pair's first update, NaN until seen
    annotator: Tensor  # (M, n)
    epoch: int = 0
    rows: Tensor = field(default_factory=lambda: torch.empty(0))  # (M, B)
    estimate: Any = None  # whatever `after_first_epoch` returns


Loss = Callable[[Tensor, Context], Tensor]  # margins (M, B) -> losses (M, B)
Factory = Callable[[list[Tensor], float, int, int], torch.optim.Optimizer]  # ..., lr, b, n


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        name: For tables and file names.
        optimizer: Made from parameters, learning rate, batch size and number of pairs.
        loss: One loss per pair.
        keep: Share of the pairs that is trained on; the rest is held out, with its noise.
        oracle: Train on rows whose label is right, only.
        after_first_epoch: Called once with the context, whose ledger is then full; the result is
            the context's `estimate` from there on. Until then it is None.
        update: What is done to each step's update; see `updates.py`. None: nothing.
        needs: Arm whose run with the same settings must be on disk before.
        backward: In place of one backward pass of the loss; see `gates.in_pieces`.
    """

    name: str
    optimizer: Factory
    loss: Loss
    keep: float = 1.0
    oracle: bool = False
    after_first_epoch: Callable[[Context], Any] | None = None
    update: str | None = None
    needs: str | None = None
    backward: Callable[..., Tensor] | None = None


def adamw(params: list[Tensor], lr: float, b: int, n: int, beta2: float = 0.999) -> Any:
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, beta2), weight_decay=0.0, foreach=True)


def gated(params: list[Tensor], lr: float, b: int, n: int, **options: Any) -> Any:
    options = {"false_open_rate": 0.05, **options}
    return PopRiskAdamW(params, lr=lr, weight_decay=0.0, foreach=True, **options)


def paper(params: list[Tensor], lr: float, b: int, n: int) -> Any:
    return PopRiskAdamW.paper(params, lr=lr, weight_decay=0.0, foreach=True)


def finite(params: list[Tensor], lr: float, b: int, n: int) -> Any:
    return gated(params, lr, b, n, alpha="finite", batch_size=b, dataset_size=n)


def plain(h: Tensor, context: Context) -> Tensor:
    return dpo_loss(h)


def ipo(h: Tensor, context: Context) -> Tensor:
    """(margin - 1 / (2 beta))^2 for h = beta margin, up to the factor beta^-2."""
    return (h - 0.5).square()


def holder(h: Tensor, context: Context) -> Tensor:
    return holder_dpo_loss(h, gamma=2.0)


def conservative(h: Tensor, context: Context) -> Tensor:
    return conservative_dpo_loss(h, context.noise_rate)


def robust(h: Tensor, context: Context, off: float = 0.0) -> Tensor:
    """The true noise rate, or one that is wrong by `off`."""
    return robust_dpo_loss(h, (context.noise_rate + off).clamp(0.0, 0.45))


A1 = Arm(name="A1 AdamW DPO", optimizer=adamw, loss=plain)
A8 = replace(A1, name="A8 gate 1", optimizer=paper)
A9 = replace(A1, name="A9 gate 0.192", optimizer=gated)
ARMS = {
    arm.name.split()[0]: arm
    for arm in (
        A1,
        replace(A1, name="A2 rDPO", loss=robust),
        replace(A1, name="A4a rDPO e-0.1", loss=partial(robust, off=-0.1)),
        replace(A1, name="A4b rDPO e+0.1", loss=partial(robust, off=0.1)),
        replace(A1, name="A5 IPO", loss=ipo),
        replace(A1, name="A6 cDPO", loss=conservative),
        replace(A1, name="A7 Hoelder", loss=holder),
        A8,
        A9,
        replace(A1, name="A10 gate b/(n-b)", optimizer=finite),
        replace(A9, name="A11 gate 0.192 + rDPO", loss=robust),
        replace(A1, name="A14 hold-out 10 %", keep=0.9),
        replace(A1, name="A15 oracle filter", oracle=True),
        replace(A1, name="C1 step of A9", update="norm", needs="A9"),
        replace(A1, name="C2 random mask of A9", update="mask", needs="A9"),
        replace(A1, name="C3 gate without s", update="ratio"),
        replace(A1, name="C4 pull to reference", update="pull"),
        replace(A1, name="C5 beta2 0.95", optimizer=partial(adamw, beta2=0.95)),
    )
}
