"""Flip report from models that never saw the pairs they judge."""

import hashlib
import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, set_seed

from poprisk_integrations._files import write_whole
from poprisk_integrations.core.noise_rate import NoiseRateEstimate
from poprisk_integrations.core.out_of_fold import MarginAverage, mean_of_judges
from poprisk_integrations.trl.flip_report import FlipReport
from poprisk_integrations.trl.label_noise import LabelNoise, PairLoss
from poprisk_integrations.trl.pairs import ROW_COLUMN, LabelledPairs
from poprisk_integrations.trl.whole_parameters import whole_parameter

if TYPE_CHECKING:
    from poprisk_integrations.trl.pair_trainer import PairTrainerPart

__all__ = ["CrossFit", "cross_fit", "cross_fit_flip_report"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """What models that never saw the pairs they judge have found.

    Attributes:
        report: The pairs, those first whose label is most probably wrong.
        estimate: The noise rate that the report was made with.
        epochs: Of each fold of each partition, epochs that its margins are averaged over.
        weights: File with the mean of the fold models' trained parameters; None if not kept.
    """

    report: FlipReport
    estimate: NoiseRateEstimate
    epochs: list[int]
    weights: Path | None = None

    def load_weights(self, trainer: Any) -> None:
        """Put the mean of the fold models into the model of a trainer that has not trained yet.

        Raises:
            ValueError: If they were not kept, or the model has no such parameters.
        """
        if self.weights is None:
            raise ValueError("The fold models were not kept: pass average_weights=True.")
        parameters = dict(trainer.model.named_parameters())
        with safe_open(self.weights, framework="pt") as saved, torch.no_grad():
            names = list(saved.keys())
            unknown = [name for name in names if name not in parameters]
            if unknown:
                raise ValueError(f"The model has no parameter {unknown[0]!r} of {self.weights}.")
            for name in names:
                with whole_parameter(parameters[name], writes=True) as whole:
                    whole.copy_(saved.get_tensor(name))


def cross_fit(
    make_trainer: Callable[[Dataset, Dataset], "PairTrainerPart"],
    dataset: Dataset,
    *,
    pair_id_column: str | None = None,
    folds: int = 4,
    partitions: int = 1,
    seed: int = 0,
    directory: str | Path | None = None,
    key: str = "",
    average_weights: bool = False,
) -> CrossFit:
    """Train once per fold on the other folds, judge the pairs of the fold, average the models.

    The report of a single run comes from margins of a model that has seen, on average, half an
    epoch. Here all come from trained models: after each epoch the pairs of the fold are judged, and
    their margins are averaged over the epochs up to the one whose average explains their labels
    best (`core.out_of_fold.MarginAverage`). A fold ends two epochs after that one, or with its
    trainer's own end. It costs up to `folds - 1` times the training of one model, and a forward
    pass over all pairs for each epoch. With several `partitions` all of that happens for each, and
    the margins of a pair are averaged over the models that judged it.

    The mean of the fold models, over the same epochs, is a better model than one that was trained
    on all pairs: each wrong label was fitted by some of the models only, and each of them has
    stopped where its own held-out labels, noisy as they are, said so. What both gain is measured in
    `recipes/benchmarks/cleaned_pairs`. Labels that are wrong for a reason that all models learn
    look right to all of them: where longer answers win there, the mean is 2 points worse than plain
    training at a low learning rate (2 better at a high one), and AUC falls from 0.88 to 0.76.
    Factors of adapters (LoRA) are averaged one by one, which is near the mean of their products
    only where the folds start from the same factors: give all trainers the same `seed`.

    Args:
        make_trainer: Gets the pairs to train on and the pairs to judge, and returns a trainer with
            these as `train_dataset` and `eval_dataset`, of a policy (`PopRiskDPOTrainer`) or of a
            reward model (`PopRiskRewardTrainer`), on a fresh model, with an output directory of its
            own.
        dataset: Preference pairs.
        pair_id_column: Column with a unique id per pair; None for row numbers.
        folds: Parts of the data, >= 2. With two each model sees half of the pairs, with four three
            quarters.
        partitions: How often the data are divided anew, >= 1. Two folds in six partitions cost six
            trainings, and rank wrong labels better than four folds in one, for three.
        seed: Of the partition, and of what `make_trainer` draws.
        directory: Where the margins of each fold are kept when it is done. Called again with the
            same pairs, folds, seed and key, what is there is not trained again. None to keep
            nothing.
        key: What else the folds depend on, such as the trainer's settings as text.
        average_weights: Whether to keep the mean of the fold models, in `directory`.

    Raises:
        ValueError: If `folds` is not in [2, number of pairs] or `partitions` < 1, an id is none,
            fewer than 50 pairs were judged, or weights are to be kept without a directory.

    Example:
        >>> def make_trainer(train, judged):  # doctest: +SKIP
        ...     args = PopRiskDPOConfig("folds", stop=False, num_train_epochs=3)
        ...     return PopRiskDPOTrainer(load_model(), args=args, train_dataset=train,
        ...                              eval_dataset=judged, processing_class=tokenizer)
        >>> found = cross_fit(make_trainer, pairs, directory="folds", average_weights=True)
        ... # doctest: +SKIP
        >>> cleaned = clean_pairs(pairs, found.report)  # doctest: +SKIP
        >>> found.load_weights(trainer)  # doctest: +SKIP
    """
    if not 2 <= folds <= len(dataset):
        raise ValueError(f"Invalid folds: {folds}. Must be in [2, {len(dataset)}].")
    if partitions < 1:
        raise ValueError(f"Invalid partitions: {partitions}. Must be >= 1.")
    if average_weights and directory is None:
        raise ValueError("Invalid average_weights: True. It needs a directory to keep them in.")
    pairs = LabelledPairs(dataset, pair_id_column)
    noise = LabelNoise(len(dataset), loss=PairLoss())
    kept = None
    if directory is not None:
        settings = f"{folds} {partitions} {seed} {key} {average_weights}"
        kept = _Kept(Path(directory), _digest(dataset, settings))
    epochs, everything = [], set(range(len(dataset)))
    is_seen = torch.zeros(len(dataset), dtype=torch.bool)
    judges = torch.full((partitions, len(dataset)), torch.nan, dtype=torch.float64)
    for number in range(folds * partitions):
        partition, fold = divmod(number, folds)
        found = None if kept is None else kept.load(number)
        if found is None:
            logger.info("Fold %d of %d.", number + 1, folds * partitions)
            places = sorted(everything)
            random.Random(seed + partition).shuffle(places)
            held_out = sorted(places[fold::folds])
            others = sorted(everything - set(held_out))
            set_seed(seed)  # heads and adapters that start at random do so alike in all folds
            trainer = make_trainer(dataset.select(others), pairs.dataset.select(held_out))
            judge = _EpochJudge(trainer, average_weights)
            trainer.add_callback(judge)
            trainer.train()
            found = judge.found
            if kept is not None and trainer.is_world_process_zero():
                kept.save(number, found, judge.weights)
            trainer.accelerator.wait_for_everyone()  # before another rank looks for the file
            del trainer, judge  # model and optimizer, before the next one is made
        judges[partition, found["rows"]] = found["margins"]
        is_seen[found["rows"]] = True
        epochs.append(int(found["epochs"]))
    rows = torch.nonzero(is_seen).squeeze(1)
    noise.margins.record(rows, mean_of_judges(list(judges))[rows], step=1)  # models that have moved
    estimate = noise.update_estimate(step=0)
    pairs.dropped = everything - set(rows.tolist())
    weights = kept.mean if kept is not None and average_weights else None
    return CrossFit(
        report=pairs.flip_report(noise), estimate=estimate, epochs=epochs, weights=weights
    )


def cross_fit_flip_report(
    make_trainer: Callable[[Dataset, Dataset], "PairTrainerPart"],
    dataset: Dataset,
    *,
    pair_id_column: str | None = None,
    folds: int = 2,
    seed: int = 0,
) -> tuple[FlipReport, NoiseRateEstimate]:
    """Report and noise rate of `cross_fit`, where the models are not wanted.

    Args:
        make_trainer: As there, like the others.
        dataset: Preference pairs.
        pair_id_column: Column with a unique id per pair; None for row numbers.
        folds: Parts of the data, >= 2; four judge better, at three times the price.
        seed: Of the partition.

    Returns:
        The report over all pairs, and the noise rate it was made with.

    Raises:
        ValueError: As `cross_fit`.
    """
    found = cross_fit(make_trainer, dataset, pair_id_column=pair_id_column, folds=folds, seed=seed)
    return found.report, found.estimate


class _Kept:
    """What folds have found, in files; a fold of other pairs or settings is not taken for theirs.

    The mean of the models grows with each fold, and is written before the fold's margins are: a
    fold that was cut in between is trained again, and counted once.
    """

    def __init__(self, directory: Path, made_of: str) -> None:
        self.mean = directory / "mean.safetensors"
        self._directory, self._made_of = directory, made_of

    def load(self, fold: int) -> dict[str, Tensor] | None:
        """Rows, margins and epochs of a fold that is done; None if it is not."""
        found = self._read(self._file(fold))
        return None if found is None else found[0]

    def save(self, fold: int, found: dict[str, Tensor], weights: dict[str, Tensor] | None) -> None:
        """Keep what a fold has found, and its model as a part of the mean."""
        if weights is not None:
            before = self._read(self.mean)
            folds = [] if before is None else json.loads(before[1]["folds"])
            if before is not None and fold not in folds:
                share = 1 / (len(folds) + 1)
                weights = {k: before[0][k].lerp(w, share) for k, w in weights.items()}
            if fold not in folds:
                self._write(self.mean, weights, folds=json.dumps([*folds, fold]))
        self._write(self._file(fold), found)

    def _file(self, fold: int) -> Path:
        return self._directory / f"fold-{fold}.safetensors"

    def _read(self, file: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        try:
            with safe_open(file, framework="pt") as saved:
                text = saved.metadata() or {}
                if text.get("made_of") == self._made_of:
                    return {name: saved.get_tensor(name) for name in saved.keys()}, text  # noqa: SIM118
        except (OSError, SafetensorError):
            pass
        return None

    def _write(self, file: Path, tensors: dict[str, Tensor], **text: str) -> None:
        with write_whole(file) as path:
            save_file(tensors, path, metadata={"made_of": self._made_of, **text})


class _EpochJudge(TrainerCallback):
    """Judges the evaluation pairs after each epoch, and ends training when they have been told."""

    def __init__(self, trainer: Any, keeps_weights: bool) -> None:
        if ROW_COLUMN not in trainer.eval_dataset.column_names:
            raise ValueError("make_trainer must pass its second argument on as eval_dataset.")
        self.weights: dict[str, Tensor] | None = None  # their mean over the epochs that count
        self._average = MarginAverage()
        self._rows = torch.empty(0, dtype=torch.int64)
        self._sum: dict[str, Tensor] = {}
        self._trainer = trainer
        self._keeps_weights = keeps_weights

    @property
    def found(self) -> dict[str, Tensor]:
        """Rows, their margins, and the number of epochs that these are of."""
        epochs = torch.tensor(self._average.best + 1)
        return {"rows": self._rows, "margins": self._average.margins(), "epochs": epochs}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same numbers on all ranks, so all of them end together."""
        rows, margins = _judge(self._trainer)
        order = rows.argsort(stable=True)
        # A sampler pads the last batch of some ranks with pairs that they have had.
        is_first = torch.ones(len(rows), dtype=torch.bool)
        is_first[1:] = rows[order][1:] != rows[order][:-1]
        self._rows = rows[order][is_first].cpu()
        self._average.add(margins[order][is_first])
        if self._keeps_weights:
            self._add_weights()
        if self._average.has_told:
            control.should_training_stop = True

    def _add_weights(self) -> None:
        now = _trained_weights(self._trainer)
        self._sum = {k: self._sum[k].add_(w) for k, w in now.items()} if self._sum else now
        epochs = len(self._average.fits)
        if self._average.best == epochs - 1:
            self.weights = {name: value / epochs for name, value in self._sum.items()}


def _trained_weights(trainer: Any) -> dict[str, Tensor]:
    """Whole trained parameters on the CPU, fp32, on rank 0. Collective."""
    network = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        trained = {name: state[name] for name in trained if name in state}
    found = {}
    for name, parameter in trained.items():
        with whole_parameter(parameter) as whole:
            if trainer.is_world_process_zero():
                found[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return found


def _judge(trainer: Any) -> tuple[Tensor, Tensor]:
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
