"""DPOTrainer for preference data with wrong labels: loss, noise rate, flip report and stop."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import logging
import math
import re
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerState
from trl import DPOTrainer

from poprisk_integrations.core.preference_losses import dpo_loss
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.trl._upstream import (
    add_metric,
    batch_log_ratios,
    current_mode,
    pair_term,
    reference_model,
)
from poprisk_integrations.trl.early_stopping import add_stop
from poprisk_integrations.trl.end_report import describe_end
from poprisk_integrations.trl.flip_report import FlipReport
from poprisk_integrations.trl.forward_recorder import ForwardRecorder
from poprisk_integrations.trl.label_noise import LabelNoise
from poprisk_integrations.trl.label_noise_callback import LabelNoiseCallback
from poprisk_integrations.trl.labelled_pairs import LabelledPairs
from poprisk_integrations.trl.on_policy_kl import on_policy_kl
from poprisk_integrations.trl.only_warns import OnlyWarns
from poprisk_integrations.trl.pair_checks import check_vocabulary
from poprisk_integrations.trl.pair_columns import PAIR_COLUMNS, PairCollator, take_pair_columns
from poprisk_integrations.trl.pair_log_ratios import margin_metrics
from poprisk_integrations.trl.pair_records import PairRecords
from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig
from poprisk_integrations.trl.validation import check_before_work

__all__ = ["PopRiskDPOTrainer"]

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
        self._pairs = LabelledPairs(args, train_dataset)
        self._margins_missing = False
        self._flips_fitted: float | None = None
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
        self._check_on_policy_kl()
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
        self._own_stop = add_stop(self)

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
        if mode == "train" and not len(self._pairs):
            rows = None  # streamed: numbers of an earlier run, if any
        self._records.add(mode, log_ratios.detach(), rows, self.state.global_step)
        return self._replaced(loss, log_ratios, rows, weights) if replaced else loss

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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the on-policy KL at the end if `args.on_policy_kl_samples` asks."""
        output = super().train(*args, **kwargs)
        if self.args.on_policy_kl_samples:
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
            kl, _ = on_policy_kl(
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
        pair_loss = self._noise.loss
        if weights is None and self.args.pair_weight_column is not None:
            raise ValueError(
                f"Invalid pair_weight_column: {self.args.pair_weight_column!r}. A batch has no "
                "weights: train_dataset or data_collator was replaced after the trainer was made. "
                "Pass them to the trainer."
            )
        if pair_loss.mode == "off" and weights is None:
            return loss
        margins = self.args.beta * (log_ratios[:, 0] - log_ratios[:, 1])
        p_correct = None
        if pair_loss.mode == "weights" and self.args.pair_weight_column is None:
            rows = torch.full_like(margins, -1, dtype=torch.int64) if rows is None else rows
            p_correct = self._noise.p_correct(rows, margins)
        ours = pair_loss(margins, weights, p_correct).mean()
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
        with self._only_warns("the margins of some pairs are lost", together=True):
            log_ratios, rows = self._records.take(mode)
            with self._only_warns("poprisk/margin_* and poprisk/kl_data are not logged"):
                return self._summary(mode, log_ratios, rows)
        return {}

    def _summary(self, mode: str, log_ratios: Tensor, rows: Tensor) -> dict[str, float]:
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

    def _check_on_policy_kl(self) -> None:
        if not self.args.on_policy_kl_samples:
            return
        if self.ref_model is None and not hasattr(self.model, "peft_config"):
            raise ValueError(
                f"Invalid on_policy_kl_samples: {self.args.on_policy_kl_samples}. With "
                "precompute_ref_log_probs no reference model is in memory: set it to 0."
            )
        data = self.train_dataset
        if not isinstance(data, Dataset) or "prompt_ids" not in data.column_names:
            raise ValueError(
                f"Invalid on_policy_kl_samples: {self.args.on_policy_kl_samples}. Prompts are "
                "taken from map-style training data of texts: set it to 0."
            )

    def _save_flip_report(self, directory: str) -> None:
        known = self._noise.rate_of_report is not None and bool(self._noise.margins.seen.any())
        if len(self._pairs) and known:
            self.flip_report().save(directory)

    def _describe_end(self, state: TrainerState) -> str:
        self._margin_metrics("train")
        stops = [
            callback.diagnosis
            for callback in self.callback_handler.callbacks
            if isinstance(callback, PopRiskEarlyStoppingCallback)
        ]
        kept = re.search(r"checkpoint-(\d+)$", state.best_model_checkpoint or "")
        return describe_end(
            self._noise,
            flips_fitted=self._flips_fitted,
            diagnosis=stops[0] if stops else None,
            kept_step=None if kept is None else int(kept.group(1)),
        )
