"""DPOTrainer for preference data with wrong labels: loss, noise rate, flip report and stop."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import logging
import math
import os
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerState
from trl import DPOTrainer

from poprisk_integrations.core.preference_losses import dpo_loss
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.huggingface import (
    PopRiskEarlyStoppingCallback,
    suggest_learning_rate,
)
from poprisk_integrations.trl._upstream import (
    ForwardRecorder,
    add_metric,
    batch_log_ratios,
    current_mode,
    pair_term,
    reference_model,
)
from poprisk_integrations.trl.flip_report import FlipReport
from poprisk_integrations.trl.label_noise import LabelNoise
from poprisk_integrations.trl.label_noise_callback import (
    LabelNoiseCallback,
    OnlyWarns,
    describe_run,
)
from poprisk_integrations.trl.on_policy_kl import check_on_policy_kl, on_policy_kl
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
from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig
from poprisk_integrations.trl.validation import check_before_work, check_vocabulary

__all__ = ["PopRiskDPOTrainer"]

LEARNING_RATE = "poprisk_learning_rate.json"

logger = logging.getLogger(__name__)


class PopRiskDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` that says how wrong the labels are, and trains well in spite of them.

    It looks at what TRL's forward passes return and adds no pass of its own. In training, the term
    `sigmoid` of the loss may become that of `args.noise`; evaluations keep TRL's loss.

    Beside TRL's metrics it logs, over the pairs since the last log and all ranks:

    - `poprisk/reward_accuracy`: share of pairs ranked as labelled, equal rewards counted half.
      TRL's `rewards/accuracies` counts them as wrong, hence its 0.0 in the first step, where policy
      and reference are the same. Both are against the labels, wrong ones too.
    - `poprisk/margin_p10`, `poprisk/margin_p50`: quantiles of the pairs' reward margins; once the
      noise rate is known also of the pairs that look clean (`_clean`) and suspect (`_suspect`).
    - `poprisk/flips_fitted`: share of the suspect pairs that are ranked as labelled.
    - `poprisk/noise_rate` with `_low` and `_high`, `poprisk/flips_suspected`.
    - `poprisk/kl_data`: mean log-ratio policy / reference on the completions of the data. It is
      not the on-policy KL divergence, see `margin_metrics`; that is `poprisk/kl_on_policy`, with
      `args.on_policy_kl_samples`.

    At the end of training `flip_report.csv`, `flip_report.parquet` and `poprisk_noise.json` are
    written to `args.output_dir` (in a hyper-parameter search to the trial's directory), and a line
    says what happened. Where one of them fails there is a warning, and the model is saved.

    With `noise="off"` whatever `trl.DPOTrainer` trains on is trained on.

    Args:
        model: Model or its name, as for `trl.DPOTrainer`.
        ref_model: Reference model, as for `trl.DPOTrainer`.
        args: Settings.
        train_dataset: Preference pairs in one of TRL's formats. Map-style data are checked before
            anything is loaded; streamed data have no flip report and no estimate of the noise.
        eval_dataset: Same, or a dict of them. Not needed for the stop.
        callbacks: A `PopRiskEarlyStoppingCallback` among them, or one that is added later, takes
            the place of the one that `args.stop` would add.
        **kwargs: Further arguments of `trl.DPOTrainer`.

    Raises:
        TypeError: If `args` is not a `PopRiskDPOConfig`.
        ValueError: If the data lack columns, or have ids or weights that are none; unless
            `noise="off"`, if they have empty rows or pairs of equal completions, or if the
            reference has another vocabulary; if a noise mode does not go with the data.
        OSError: If `args.output_dir` cannot be written.
    """

    _own_stop: PopRiskEarlyStoppingCallback | None = None

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: PopRiskDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        args = PopRiskDPOConfig() if args is None else args
        if not isinstance(args, PopRiskDPOConfig):
            raise TypeError(f"args must be a PopRiskDPOConfig, not {type(args).__name__}.")
        check_before_work(args, train_dataset, eval_dataset)
        self._only_warns = OnlyWarns()
        self._pairs = LabelledPairs(train_dataset, args.pair_id_column, args.pair_weight_column)
        self._margins_missing = False
        self._flips_fitted: float | None = None
        self._last_batch: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            self._pairs.dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            **kwargs,
        )
        check_vocabulary(self.model, self.ref_model, strict=args.noise != "off")
        check_on_policy_kl(self)
        self.data_collator = PairCollator(self.data_collator)
        self._pairs.note_dropped(self.train_dataset)
        self._noise = LabelNoise(len(self._pairs), loss=args.pair_loss, noise_rate=args.noise_rate)
        self._records = PairRecords(self.accelerator.gather, args.beta, self._noise.margins)
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, in training with the pairs' loss of the noise mode; keeps log-ratios."""
        self._last_batch = None
        is_trained_on = torch.is_grad_enabled()  # not so of pairs that sit out
        inputs, rows, weights = take_pair_columns(inputs)
        if return_outputs:
            return super().compute_loss(model, inputs, True, num_items_in_batch)
        reference: Any = self.ref_model if self.ref_model is not None else self.model
        with ForwardRecorder(model, reference) as recorder:
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        mode = current_mode(self)
        replaced = mode == "train" and self.args.loss_is_replaced
        log_ratios = None
        if replaced:
            log_ratios = batch_log_ratios(self, inputs, recorder)
        else:  # they are only for the log
            unknown = "the margins of a batch are not known"
            with self._only_warns(unknown, together=True), torch.no_grad():
                log_ratios = batch_log_ratios(self, inputs, recorder)
        if log_ratios is None:
            self._without_margins()
            return loss
        if self._searches_rate:  # the pairs of a search have not been seen by the run
            return self._replaced(loss, log_ratios, rows, weights) if replaced else loss
        if mode == "train" and not len(self._pairs):
            rows = None  # streamed: numbers of an earlier run, if any
        kind = "sitters" if mode == "train" and not is_trained_on else mode
        self._records.add(kind, log_ratios.detach(), rows, self.state.global_step)
        self._last_batch = (reward_margins(log_ratios.detach(), self.args.beta), rows, weights)
        return self._replaced(loss, log_ratios, rows, weights) if replaced else loss

    def example_values(self) -> dict[str, Tensor] | None:
        """Loss, reward accuracy and reward margin of each pair of the last batch, (B,) each.

        The loss is that of the noise mode. In the first epoch it is NaN while that mode waits for
        the noise rate: losses of two modes do not compare.
        """
        if self._last_batch is None:
            return None
        margins, rows, weights = self._last_batch
        waits = self._noise.lacks_rate is not None and (self.state.epoch or 0.0) < 1.0
        if weights is not None and self.args.noise == "weights":
            waits = False  # these need no rate
        losses = torch.full_like(margins, torch.nan)
        if not waits:
            with torch.no_grad():
                losses = self._noise.losses(margins, rows, weights)
        return {
            "loss": losses,
            "reward_accuracy": reward_accuracy(margins),
            "reward_margin": margins,
        }

    def example_values_refusal(self) -> str:
        """Why there are no `example_values` in this run, in a few words; "" if there are."""
        return cast(PopRiskDPOConfig, self.args).pair_values_refusal

    def take_log_ratios(self, mode: str) -> tuple[Tensor, Tensor]:
        """Log-ratios and row numbers of the pairs of all ranks since the last log or call.

        Args:
            mode: "train" or "eval".

        Returns:
            Shape (N, 2), chosen and rejected, and shape (N,); a row is -1 where pairs have none.
        """
        return self._records.take(mode)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the margins of the pairs since the last one."""
        for name, value in self._margin_metrics(current_mode(self)).items():
            add_metric(self, name, value)
        super().log(logs, start_time)

    @property
    def _searches_rate(self) -> bool:
        """Whether this training is one of `suggest_learning_rate`, which no callback watches."""
        callbacks = self.callback_handler.callbacks
        return not any(isinstance(callback, LabelNoiseCallback) for callback in callbacks)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after a search and before the on-policy KL, if `args` ask for them."""
        searches = self.args.auto_learning_rate and not self._searches_rate
        if searches and not resume_from_checkpoint:  # a checkpoint holds its run's rate
            found = suggest_learning_rate(self, start=self.args.learning_rate, update=True)
            if self.is_world_process_zero():
                tqdm.write(f"poprisk: {found}", file=sys.stderr)  # leaves progress bars whole
                found.save(os.path.join(str(self.args.output_dir), LEARNING_RATE))
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.args.on_policy_kl_samples and not self._searches_rate:
            self._log_on_policy_kl("")
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's, with the on-policy KL if `args.on_policy_kl_samples` asks."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.args.on_policy_kl_samples:
            prefix = kwargs.get("metric_key_prefix", "eval")
            metrics |= self._log_on_policy_kl(f"{prefix}_")
        return metrics

    def on_policy_kl(self, max_new_tokens: int = 64) -> float:
        """KL(policy || reference) in nats per completion, on `args.on_policy_kl_samples` samples.

        Args:
            max_new_tokens: Longest completion.

        Returns:
            The estimate; NaN, after a warning, where sampling failed.
        """
        wanted = max(self.args.on_policy_kl_samples, 1)
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = -(-wanted // ranks)
        data: Any = self.train_dataset
        places = [(rank * count + i) * len(data) // (count * ranks) for i in range(count)]
        kl = math.nan  # if it fails here, the other ranks still wait for this one
        with self._only_warns("the on-policy KL could not be sampled"):
            kl = on_policy_kl(
                self.accelerator.unwrap_model(self.model),
                lambda: reference_model(self),
                [data[place]["prompt_ids"] for place in places],
                max_new_tokens=max_new_tokens,
                eos_token_id=getattr(self.processing_class, "eos_token_id", None),
                seed=self.args.seed + rank,
            )
        return float(mean_over_ranks(torch.tensor(kl, device=self.accelerator.device)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, with the flip report beside the model."""
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

    def _replaced(
        self, loss: Tensor, log_ratios: Tensor, rows: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """The loss with the pairs' term of the noise mode; TRL's own while that mode is off."""
        if weights is None and self.args.pair_weight_column is not None:
            raise ValueError(
                f"Invalid pair_weight_column: {self.args.pair_weight_column!r}. A batch has no "
                "weights: train_dataset or data_collator was replaced after the trainer was made. "
                "Pass them to the trainer."
            )
        if self._noise.loss.mode == "off" and weights is None:
            return loss
        margins = reward_margins(log_ratios, self.args.beta)
        ours = self._noise.losses(margins, rows, weights).mean()
        factor, alone = pair_term(self)
        if alone:
            return factor * ours
        # The other terms are TRL's business: take out its term for the pairs, put in ours.
        return loss + factor * (ours - dpo_loss(margins).mean())

    def _log_on_policy_kl(self, prefix: str) -> dict[str, float]:
        kl = self.on_policy_kl()
        found = {} if math.isnan(kl) else {f"{prefix}poprisk/kl_on_policy": kl}
        if found:
            self.log(dict(found))
        return found

    def _margin_metrics(self, mode: str) -> dict[str, float]:
        """What is to be logged of the pairs since the last log; nothing where that fails."""
        metrics: dict[str, float] = {}
        with self._only_warns("the margins of some pairs are lost", together=True):
            log_ratios, rows = self._records.take(mode)
            with self._only_warns("poprisk/margin_* and poprisk/kl_data are not logged"):
                suspect = None
                if mode == "train" and self._noise.estimate is not None and bool((rows >= 0).all()):
                    suspect = self._noise.suspects()[rows.cpu()]
                metrics = margin_metrics(log_ratios, self.args.beta, suspect)
        if mode == "train":
            self._flips_fitted = metrics.get("poprisk/flips_fitted", self._flips_fitted)
        return metrics

    def _without_margins(self) -> None:
        if self.args.noise not in ("off", "auto") or self.args.pair_weight_column is not None:
            raise ValueError(
                f"Invalid noise: {self.args.noise!r}. Per-pair margins are not available in this "
                "configuration: set noise='off'."
            )
        if not self._margins_missing:
            self._margins_missing = True
            logger.warning(
                "Per-pair margins are not available in this configuration: poprisk/margin_* and "
                "poprisk/kl_data are not logged, and the noise rate is not estimated. Training is "
                "that of TRL."
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
