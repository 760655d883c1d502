"""DPOTrainer for preference data with wrong labels: loss, noise rate, flip report and stop."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import math
import os
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from trl import DPOTrainer

from poprisk_integrations.core.preference_losses import dpo_loss
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.huggingface import suggest_learning_rate
from poprisk_integrations.trl._upstream import (
    ForwardRecorder,
    batch_log_ratios,
    current_mode,
    pair_term,
    reference_model,
)
from poprisk_integrations.trl.on_policy_kl import check_on_policy_kl, on_policy_kl
from poprisk_integrations.trl.pair_records import reward_margins
from poprisk_integrations.trl.pair_trainer import PairTrainerPart
from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig
from poprisk_integrations.trl.validation import check_tokens, check_vocabulary

__all__ = ["PopRiskDPOTrainer"]

LEARNING_RATE = "poprisk_learning_rate.json"


class PopRiskDPOTrainer(PairTrainerPart, DPOTrainer):
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
      not the on-policy KL divergence, and can be negative; that is
      `poprisk/kl_on_policy`, with `args.on_policy_kl_samples`.

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

    _logged = "poprisk/margin_* and poprisk/kl_data"

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
        self._number_pairs(args, PopRiskDPOConfig, train_dataset, eval_dataset)
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
        self._watch_pairs(args.pair_loss, args.beta, "their prompts alone fill max_length")
        if self.is_world_process_zero():
            with self._only_warns("the tokens of the pairs could not be looked at"):
                check_tokens(args, self._pairs.dataset, self.processing_class)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, in training with the pairs' loss of the noise mode; keeps log-ratios."""
        inputs, rows, weights = self._begin_batch(inputs)
        if return_outputs:
            return super().compute_loss(model, inputs, True, num_items_in_batch)
        reference: Any = self.ref_model if self.ref_model is not None else self.model
        with ForwardRecorder(model, reference) as recorder:
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        replaced = current_mode(self) == "train" and self.args.loss_is_replaced
        log_ratios = None
        if replaced:
            log_ratios = batch_log_ratios(self, inputs, recorder)
        else:  # they are only for the log
            unknown = "the margins of a batch are not known"
            with self._only_warns(unknown, together=True), torch.no_grad():
                log_ratios = batch_log_ratios(self, inputs, recorder)
        self._note_batch(log_ratios, rows, lambda margins: self._losses(margins, rows, weights))
        if log_ratios is None or not replaced:
            return loss
        return self._replaced(loss, log_ratios, rows, weights)

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

    def _losses(self, margins: Tensor, rows: Tensor | None, weights: Tensor | None) -> Tensor:
        """Those in force; NaN in the first epoch while a noise mode waits for its rate.

        The losses of two modes do not compare.
        """
        waits = self._noise.lacks_rate is not None and (self.state.epoch or 0.0) < 1.0
        if weights is not None and self.args.noise == "weights":
            waits = False  # these need no rate
        if waits:
            return torch.full_like(margins, torch.nan)
        return self._noise.losses(margins, rows, weights)

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

    def _more_metrics(self, values: Tensor) -> dict[str, float]:
        """`poprisk/kl_data`: the mean log-ratio over the completions of the data, in nats.

        It is not the on-policy KL divergence, which is a mean over the policy's own samples: it can
        be negative, and falls while the policy moves away from these completions.
        """
        return {"poprisk/kl_data": float(values.mean())}

    def _without_margins(self) -> None:
        if self.args.noise not in ("off", "auto") or self.args.pair_weight_column is not None:
            raise ValueError(
                f"Invalid noise: {self.args.noise!r}. Per-pair margins are not available in this "
                "configuration: set noise='off'."
            )
        super()._without_margins()
