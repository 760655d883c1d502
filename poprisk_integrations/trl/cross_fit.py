"""Flip report from models that never saw the pairs they judge."""

import hashlib
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from poprisk_integrations._files import write_whole
from poprisk_integrations.core.noise_rate import NoiseRateEstimate
from poprisk_integrations.core.out_of_fold import MarginAverage
from poprisk_integrations.trl.flip_report import FlipReport
from poprisk_integrations.trl.label_noise import LabelNoise, PairLoss
from poprisk_integrations.trl.pairs import ROW_COLUMN, LabelledPairs

if TYPE_CHECKING:
    from poprisk_integrations.trl.pair_trainer import PairTrainerPart

__all__ = ["cross_fit_flip_report", "fold_file"]

logger = logging.getLogger(__name__)


def cross_fit_flip_report(
    make_trainer: Callable[[Dataset, Dataset], "PairTrainerPart"],
    dataset: Dataset,
    *,
    pair_id_column: str | None = None,
    folds: int = 4,
    seed: int = 0,
    directory: str | Path | None = None,
    key: str = "",
) -> tuple[FlipReport, NoiseRateEstimate]:
    """Train once per fold on the other folds, and judge the pairs of the fold.

    The report of a single run comes from margins of a model that has seen, on average, half an
    epoch. Here all come from trained models: after each epoch the pairs of the fold are judged, and
    their margins are averaged over the epochs up to the one whose average explains their labels
    best (`core.out_of_fold.MarginAverage`). A fold ends two epochs after that one, or with its
    trainer's own end. It costs up to `folds - 1` times the training of one model, and a forward
    pass over all pairs for each epoch. What it gains: `recipes/benchmarks/cleaned_pairs`.

    Args:
        make_trainer: Gets the pairs to train on and the pairs to judge, and returns a trainer with
            these as `train_dataset` and `eval_dataset`, of a policy (`PopRiskDPOTrainer`) or of a
            reward model (`PopRiskRewardTrainer`), on a fresh model, with an output directory of its
            own.
        dataset: Preference pairs.
        pair_id_column: Column with a unique id per pair; None for row numbers.
        folds: Parts of the data, >= 2. With two each model sees half of the pairs, with four three
            quarters.
        seed: Of the partition.
        directory: Where the margins of each fold are kept when it is done. Called again with the
            same pairs, folds, seed and key, what is there is not trained again. None to keep
            nothing.
        key: What else the folds depend on, such as the trainer's settings as text.

    Returns:
        The report over all pairs, and the noise rate it was made with.

    Raises:
        ValueError: If `folds` is not in [2, number of pairs], an id is none, or fewer than 50 pairs
            were judged.

    Example:
        >>> def make_trainer(train, judged):  # doctest: +SKIP
        ...     args = PopRiskDPOConfig("folds", stop=False, num_train_epochs=3)
        ...     return PopRiskDPOTrainer(load_model(), args=args, train_dataset=train,
        ...                              eval_dataset=judged, processing_class=tokenizer)
        >>> report, estimate = cross_fit_flip_report(make_trainer, pairs)  # doctest: +SKIP
        >>> cleaned = clean_pairs(pairs, report)  # doctest: +SKIP
    """
    if not 2 <= folds <= len(dataset):
        raise ValueError(f"Invalid folds: {folds}. Must be in [2, {len(dataset)}].")
    pairs = LabelledPairs(dataset, pair_id_column)
    places = list(range(len(dataset)))
    random.Random(seed).shuffle(places)
    noise = LabelNoise(len(dataset), loss=PairLoss())
    made_of = "" if directory is None else _digest(dataset, f"{folds} {seed} {key}")
    for fold in range(folds):
        file = None if directory is None else fold_file(directory, fold)
        found = None if file is None else _kept(file, made_of)
        if found is None:
            logger.info("Fold %d of %d.", fold + 1, folds)
            held_out = sorted(places[fold::folds])
            others = sorted(set(places) - set(held_out))
            trainer = make_trainer(dataset.select(others), pairs.dataset.select(held_out))
            judge = _EpochJudge(trainer)
            trainer.add_callback(judge)
            trainer.train()
            found = judge.rows, judge.average.margins()
            if file is not None and trainer.is_world_process_zero():
                with write_whole(file) as path:
                    tensors = {"rows": found[0], "margins": found[1]}
                    save_file(tensors, path, metadata={"made_of": made_of})
            del trainer, judge  # model and optimizer, before the next one is made
        noise.margins.record(*found, step=1)  # of a model that has moved: all alike
    estimate = noise.update_estimate(step=0)
    pairs.dropped = set(places) - set(torch.nonzero(noise.margins.seen).squeeze(1).tolist())
    return pairs.flip_report(noise), estimate


def fold_file(directory: str | Path, fold: int) -> Path:
    """Where the margins of a fold are kept."""
    return Path(directory) / f"fold-{fold}.safetensors"


class _EpochJudge(TrainerCallback):
    """Judges the evaluation pairs after each epoch, and ends training when they have been told."""

    def __init__(self, trainer: Any) -> None:
        if ROW_COLUMN not in trainer.eval_dataset.column_names:
            raise ValueError("make_trainer must pass its second argument on as eval_dataset.")
        self.average = MarginAverage()
        self.rows = torch.empty(0, dtype=torch.int64)
        self._trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same numbers on all ranks, so all of them end together."""
        rows, margins = _judge(self._trainer)
        order = rows.argsort(stable=True)
        # A sampler pads the last batch of some ranks with pairs that they have had.
        is_first = torch.ones(len(rows), dtype=torch.bool)
        is_first[1:] = rows[order][1:] != rows[order][:-1]
        self.rows = rows[order][is_first].cpu()
        self.average.add(margins[order][is_first])
        if self.average.has_told:
            control.should_training_stop = True


def _judge(trainer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and margins of the trainer's evaluation pairs, under the model as it is."""
    model = trainer.model
    was_training = model.training
    model.eval()
    for inputs in trainer.get_eval_dataloader():
        trainer.prediction_step(trainer.model_wrapped, inputs, prediction_loss_only=True)
    model.train(was_training)
    margins, rows = trainer.take_margins("eval")
    return rows, margins


def _digest(dataset: Dataset, settings: str) -> str:
    """Of pairs and settings: a fold of other ones is not to be taken for these."""
    content = hashlib.sha256(settings.encode())
    names = [name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names]
    for batch in dataset.with_format(None).select_columns(names).iter(batch_size=1000):
        content.update(repr(batch).encode())
    return content.hexdigest()


def _kept(file: Path, made_of: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows and margins of a fold that was done before; None if it was not, or is of other pairs."""
    try:
        with safe_open(file, framework="pt") as saved:
            if saved.metadata() == {"made_of": made_of}:
                return saved.get_tensor("rows"), saved.get_tensor("margins")
    except (OSError, SafetensorError):
        pass
    return None
