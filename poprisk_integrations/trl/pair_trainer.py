"""What our trainers of preference pairs share: margins, noise rate, flip report and stop."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerState

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.trl._upstream import add_metric, current_mode
from poprisk_integrations.trl.flip_report import FlipReport
from poprisk_integrations.trl.label_noise import LabelNoise, PairLoss
from poprisk_integrations.trl.label_noise_callback import (
    LabelNoiseCallback,
    OnlyWarns,
    describe_run,
)
from poprisk_integrations.trl.pair_options import PairOptions
from poprisk_integrations.trl.pair_records import (
    PairRecords,
    margin_metrics,
    reward_accuracy,
    reward_margins,
)
from poprisk_integrations.trl.pairs import (
    PAIR_COLUMNS,
    LabelledPairs,
    PairCollator,
    take_pair_columns,
)
from poprisk_integrations.trl.validation import check_before_work
from poprisk_integrations.trl.whole_parameters import save_untrained

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["PairTrainerPart"]


class PairTrainerPart(_Trainer):
    """Part of a trainer of TRL's on preference pairs; stands before it among the bases.

    The trainer calls `_number_pairs` before TRL's constructor, which gets `_pairs.dataset`, and
    `_watch_pairs` after it. Its `compute_loss` calls `_begin_batch`, then TRL's, then `_note_batch`
    with two numbers for each pair, those of the chosen and of the rejected completion: their
    difference times a factor is the pair's margin.
    """

    _own_stop: PopRiskEarlyStoppingCallback | None = None
    _logged = "poprisk/margin_*"  # what is logged of the margins, for warnings

    def _number_pairs(
        self,
        args: Any,
        kind: type[PairOptions],
        train_dataset: Any,
        eval_dataset: Any,
        **check_options: Any,
    ) -> None:
        """Refuse what cannot work, and give the pairs numbers. Before anything is loaded."""
        if not isinstance(args, kind):
            raise TypeError(f"args must be a {kind.__name__}, not {type(args).__name__}.")
        check_before_work(args, train_dataset, eval_dataset, **check_options)
        self._only_warns = OnlyWarns()
        self._pairs = LabelledPairs(
            train_dataset, args.pair_id_column, getattr(args, "pair_weight_column", None)
        )
        self._flips_fitted: float | None = None
        self._last_batch: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None

    def _watch_pairs(self, loss: PairLoss, factor: float, dropped_because: str) -> None:
        """Add what records the margins, and the stop that `args` ask for."""
        args: Any = self.args
        self.data_collator = PairCollator(self.data_collator)
        self._pairs.note_dropped(self.train_dataset, dropped_because)
        self._noise = LabelNoise(len(self._pairs), loss=loss, noise_rate=args.noise_rate)
        self._records = PairRecords(self.accelerator.gather, factor, self._noise.margins)
        self.add_callback(
            LabelNoiseCallback(
                self._noise,
                self._records,
                self._describe_end,
                self._save_flip_report,
                only_warns=self._only_warns,
            )
        )
        kinds = [type(callback) for callback in self.callback_handler.callbacks]
        if args.stop and not any(issubclass(k, PopRiskEarlyStoppingCallback) for k in kinds):
            options = args.stop_options.arguments()
            if options["window"] == "auto":
                # A third of a pass, however long the run: wrong labels are fitted within a few
                # epochs, at large rates within the second, which leaves no window of a whole one.
                # How many steps that is, is known when training starts (auto_find_batch_size).
                options["window"] = "third"
            stop = PopRiskEarlyStoppingCallback(**options)
            self.add_callback(stop)
            self._own_stop = stop

    def add_callback(self, callback: Any) -> None:
        """Trainer's; a stop of the user's takes the place of the one that `args.stop` added."""
        kind = callback if isinstance(callback, type) else type(callback)
        if self._own_stop is not None and issubclass(kind, PopRiskEarlyStoppingCallback):
            self.remove_callback(self._own_stop)
            self._own_stop = None
        super().add_callback(callback)

    def flip_report(self) -> FlipReport:
        """The pairs with the probability that their label is wrong, the most suspect first.

        Probabilities come from the margin that a pair had before it was first trained on, with the
        noise rate that these margins give (or `args.noise_rate`).

        Raises:
            ValueError: If the data are streamed, or too few pairs have been trained on.
        """
        return self._pairs.flip_report(self._noise)

    def example_values(self) -> dict[str, Tensor] | None:
        """Loss, reward accuracy and reward margin of each pair of the last batch, (B,) each.

        The loss is that of training; NaN where it does not compare with that of later steps.
        """
        if self._last_batch is None:
            return None
        margins, losses = self._last_batch
        with torch.no_grad():
            return {
                "loss": losses(margins),
                "reward_accuracy": reward_accuracy(margins),
                "reward_margin": margins,
            }

    def take_margins(self, mode: str) -> tuple[Tensor, Tensor]:
        """Margins and row numbers of the pairs of all ranks since the last log or call.

        Args:
            mode: "train" or "eval".

        Returns:
            Two tensors of shape (N,); a row is -1 where pairs have none.
        """
        values, rows = self._records.take(mode)
        return reward_margins(values, self._records.beta), rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the margins of the pairs since the last one."""
        for name, value in self._margin_metrics(current_mode(self)).items():
            add_metric(self, name, value)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, with the flip report beside the model."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            save_untrained(self, str(output_dir or self.args.output_dir))
        else:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            directory = str(output_dir or self.args.output_dir)
            with self._only_warns(
                "the flip report could not be written", f"the model is saved in {directory!r}"
            ):
                self._save_flip_report(directory)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in PAIR_COLUMNS if name not in columns]

    @property
    def _searches_rate(self) -> bool:
        """Whether this training is one of `suggest_learning_rate`, which no callback watches."""
        callbacks = self.callback_handler.callbacks
        return not any(isinstance(callback, LabelNoiseCallback) for callback in callbacks)

    def _begin_batch(
        self, inputs: dict[str, Any]
    ) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
        """The batch as TRL knows it, row numbers and weights of its pairs."""
        self._last_batch = None
        inputs, rows, weights = take_pair_columns(inputs)
        if current_mode(self) == "train" and not len(self._pairs):
            rows = None  # streamed: numbers of an earlier run, if any
        return inputs, rows, weights

    def _note_batch(
        self, values: Tensor | None, rows: Tensor | None, losses: Callable[[Tensor], Tensor]
    ) -> None:
        """Keep a batch's values, (B, 2); `losses` makes its pairs' losses of their margins.

        Without values there are no margins in this configuration, which is said once.
        """
        if values is None:
            self._without_margins()
            return
        if self._searches_rate:  # the pairs of a search have not been seen by the run
            return
        kind = current_mode(self)
        if kind == "train" and not torch.is_grad_enabled():
            kind = "sitters"
        values = values.detach()
        self._records.add(kind, values, rows, self.state.global_step)
        self._last_batch = reward_margins(values, self._records.beta), losses

    def _more_metrics(self, values: Tensor) -> dict[str, float]:
        """What a trainer logs of the values, (N, 2) with N > 0, beside their margins."""
        return {}

    def _margin_metrics(self, mode: str) -> dict[str, float]:
        """What is to be logged of the pairs since the last log; nothing where that fails."""
        metrics: dict[str, float] = {}
        with self._only_warns("the margins of some pairs are lost", together=True):
            values, rows = self._records.take(mode)
            with self._only_warns(f"{self._logged} are not logged"):
                suspect = None
                if mode == "train" and self._noise.estimate is not None and bool((rows >= 0).all()):
                    suspect = self._noise.suspects()[rows.cpu()]
                if len(values):
                    margins = reward_margins(values, self._records.beta)
                    metrics = self._more_metrics(values) | margin_metrics(margins, suspect)
        if mode == "train":
            self._flips_fitted = metrics.get("poprisk/flips_fitted", self._flips_fitted)
        return metrics

    def _without_margins(self) -> None:
        self._only_warns.once(
            f"Per-pair margins are not available in this configuration: {self._logged} are not "
            "logged, and the noise rate is not estimated. Training is that of TRL."
        )

    def _save_flip_report(self, directory: str) -> None:
        known = self._noise.rate_of_report is not None and bool(self._noise.margins.seen.any())
        if len(self._pairs) and known:
            self.flip_report().save(directory)

    def _describe_end(self, state: TrainerState) -> str:
        self._margin_metrics("train")
        return describe_run(
            self._noise, self.callback_handler.callbacks, state, flips_fitted=self._flips_fitted
        )
