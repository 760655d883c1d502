"""RewardTrainer for preference data with wrong labels: noise rate, flip report and stop."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

from typing import Any

from torch import Tensor, nn
from trl import RewardTrainer

from poprisk_integrations.core.preference_losses import dpo_loss
from poprisk_integrations.trl._upstream import ForwardRecorder, batch_rewards
from poprisk_integrations.trl.label_noise import PairLoss
from poprisk_integrations.trl.pair_trainer import PairTrainerPart
from poprisk_integrations.trl.poprisk_reward_config import PopRiskRewardConfig

__all__ = ["PopRiskRewardTrainer"]

# Columns of data that are tokenized already; the second are former names, which TRL still takes.
_TOKENIZED = (
    frozenset({"chosen_ids", "rejected_ids"}),
    frozenset({"chosen_input_ids", "rejected_input_ids"}),
)


class PopRiskRewardTrainer(PairTrainerPart, RewardTrainer):
    """`trl.RewardTrainer` that says how wrong the labels are, and stops before they are learned.

    It looks at what TRL's forward pass returns and adds no pass of its own; the loss is TRL's. The
    margin of a pair is r(chosen) - r(rejected).

    Beside TRL's metrics it logs, over the pairs since the last log and all ranks:

    - `poprisk/reward_accuracy`: share of pairs ranked as labelled, equal rewards counted half.
    - `poprisk/margin_p10`, `poprisk/margin_p50`: quantiles of the margins; once the noise rate is
      known also of the pairs that look clean (`_clean`) and suspect (`_suspect`).
    - `poprisk/flips_fitted`: share of the suspect pairs that are ranked as labelled.
    - `poprisk/noise_rate` with `_low` and `_high`, `poprisk/flips_suspected`.

    At the end of training `flip_report.csv`, `flip_report.parquet` and `poprisk_noise.json` are
    written to `args.output_dir`, and a line says what happened. Where one of them fails there is a
    warning, and the model is saved. Where a model gives no single reward for each completion there
    are no margins, which is said once, and training is TRL's.

    Args:
        model: Model or its name, as for `trl.RewardTrainer`.
        args: Settings.
        data_collator: Of TRL's batches: first all chosen, then all rejected completions.
        train_dataset: Preference pairs in one of TRL's formats. Map-style data are checked before
            anything is loaded; streamed data have no flip report and no estimate of the noise.
        eval_dataset: Same, or a dict of them. Not needed for the stop.
        processing_class: Tokenizer, as for `trl.RewardTrainer`.
        compute_metrics: As for `trl.RewardTrainer`.
        callbacks: A `PopRiskEarlyStoppingCallback` among them, or one that is added later, takes
            the place of the one that `args.stop` would add.
        **kwargs: Further arguments of `trl.RewardTrainer`.

    Raises:
        TypeError: If `args` is not a `PopRiskRewardConfig`.
        ValueError: If the data lack columns or have ids that are none; unless `noise="off"`, if
            they have empty rows or pairs of equal completions.
        OSError: If `args.output_dir` cannot be written.
    """

    def __init__(
        self,
        model: Any,
        args: PopRiskRewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        args = PopRiskRewardConfig() if args is None else args
        self._number_pairs(
            args, PopRiskRewardConfig, train_dataset, eval_dataset, tokenized=_TOKENIZED
        )
        super().__init__(
            model,
            args,
            data_collator,
            self._pairs.dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            **kwargs,
        )
        self._watch_pairs(PairLoss(), 1.0, "they are longer than max_length")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's, to the bit; keeps the rewards of the pairs."""
        inputs, rows, _ = self._begin_batch(inputs)
        with ForwardRecorder(model, model) as recorder:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rewards = None
        with self._only_warns("the margins of a batch are not known", together=True):
            rewards = batch_rewards(recorder)
        self._note_batch(rewards, rows, lambda margins: self._losses(margins, rewards, inputs))
        return result

    def _losses(self, margins: Tensor, rewards: Any, inputs: dict[str, Any]) -> Tensor:
        """What TRL's loss is the mean of."""
        losses = dpo_loss(margins - inputs["margin"] if "margin" in inputs else margins)
        coefficient = self.args.center_rewards_coefficient
        if coefficient is not None:
            losses = losses + coefficient * rewards.sum(dim=1).square()
        return losses
