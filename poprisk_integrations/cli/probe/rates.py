"""`poprisk probe --lr`: the training again at one learning rate after the other."""

import argparse
import random
from typing import Any

import torch

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.probe.sources import RunSizes, watch_training
from poprisk_integrations.cli.probe.watch import RateWatch, StepWatch
from poprisk_integrations.diagnostics.learning_rate_finder import (
    FinderOptions,
    LearningRateSuggestion,
    find_learning_rate,
)
from poprisk_integrations.diagnostics.rate_probe import RateProbe

__all__ = ["search_rate"]

_SEED = 0  # the same batches and first weights for each rate, if the training sets no seed


def search_rate(
    args: argparse.Namespace, target: str | None, said: RunSizes, bar: Any
) -> LearningRateSuggestion:
    """Train as often as the search asks.

    A first step of the training tells its sizes and its optimizer.
    """
    try:
        options = FinderOptions(
            steps=args.lr_steps,
            score_batches=args.lr_score,
            start=args.lr_start,
            factor=args.lr_factor,
            candidates=args.lr_candidates,
        )
    except ValueError as error:
        raise UsageError(f"--lr: {error}") from error
    first = StepWatch(1)
    sizes = said.or_else(watch_training(args, target, first))
    if not first.watched:
        raise UsageError("no torch optimizer took a step")

    def train(probe: RateProbe) -> None:
        _seed_all()
        watch_training(args, target, RateWatch(probe))

    try:
        return find_learning_rate(
            train,
            options,
            optimizer=first.watched[0].optimizer,
            epoch_steps=sizes.epoch_steps,
            total_steps=sizes.total_steps,
            bar=bar,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _seed_all() -> None:
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(_SEED)
