"""DPOTrainer with per-pair margins, checks of the data, and a stop without validation data."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from poprisk_integrations.huggingface.registration import PreClipNorm
from poprisk_integrations.trl._upstream import add_metric, batch_log_ratios, current_mode
from poprisk_integrations.trl.early_stopping import add_stop
from poprisk_integrations.trl.forward_recorder import ForwardRecorder
from poprisk_integrations.trl.pair_log_ratios import margin_metrics
from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig
from poprisk_integrations.trl.validation import check_before_work

__all__ = ["PopRiskDPOTrainer"]

logger = logging.getLogger(__name__)


class PopRiskDPOTrainer(PreClipNorm, DPOTrainer):
    """`trl.DPOTrainer` whose optimizer and stop are made for data with wrong labels.

    The loss is TRL's own: this class looks at what its forward passes return and adds no pass.
    Beside TRL's metrics it logs, over the pairs since the last log and all ranks:

    - `poprisk/margin_p10`, `poprisk/margin_p50`: quantiles of the pairs' reward margins.
    - `poprisk/kl_data`: mean log-ratio policy / reference on the completions of the data. It is
      not the on-policy KL divergence, see `margin_metrics`.

    Args:
        model: Model or its name, as for `trl.DPOTrainer`.
        ref_model: Reference model, as for `trl.DPOTrainer`.
        args: Settings.
        train_dataset: Preference pairs in one of TRL's formats. Map-style data are checked before
            anything is loaded.
        eval_dataset: Same, or a dict of them. Not needed for the stop.
        callbacks: A `PopRiskEarlyStoppingCallback` among them takes the place of the one that
            `args.stop` would add.
        **kwargs: Further arguments of `trl.DPOTrainer`.

    Raises:
        TypeError: If `args` is not a `PopRiskDPOConfig`.
        ValueError: If the data lack columns, have empty rows or pairs of equal completions, or
            do not fill one global batch.
        OSError: If `args.output_dir` cannot be written.
    """

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
        self._log_ratios: dict[str, list[Tensor]] = defaultdict(list)  # mode -> (B, 2) each
        self._margins_missing = False
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            **kwargs,
        )
        add_stop(self)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, unchanged; the log-ratios of the batch are kept for the next log."""
        if return_outputs:
            return super().compute_loss(model, inputs, True, num_items_in_batch)
        reference: Any = self.ref_model if self.ref_model is not None else self.model
        with ForwardRecorder(model, reference) as recorder:
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        log_ratios = batch_log_ratios(self, inputs, recorder)
        if log_ratios is not None:
            self._log_ratios[current_mode(self)].append(self.accelerator.gather(log_ratios))
        elif not self._margins_missing:
            self._margins_missing = True
            logger.warning(
                "Per-pair margins are not available in this configuration: poprisk/margin_* and "
                "poprisk/kl_data are not logged. Training is not affected."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the margins of the pairs since the last one."""
        log_ratios = self._log_ratios.pop(current_mode(self), [])
        if log_ratios:
            for name, value in margin_metrics(torch.cat(log_ratios), self.args.beta).items():
                add_metric(self, name, value)
        super().log(logs, start_time)
