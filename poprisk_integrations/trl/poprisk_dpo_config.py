"""Settings of PopRiskDPOTrainer: TRL's, our optimizer, the noise mode, and the stop."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import logging
import math
import os
from dataclasses import dataclass

from trl import DPOConfig

from poprisk_integrations.trl._upstream import LIGER_HIDES_LOG_PROBS
from poprisk_integrations.trl.label_noise import AUTO_MODE, MODES, PairLoss
from poprisk_integrations.trl.pair_options import PairOptions, option

__all__ = ["PopRiskDPOConfig"]

logger = logging.getLogger(__name__)

# The losses of TRL that read `label_smoothing`. All others ignore it without a word.
_SMOOTHED_LOSSES = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})
# Options of TRL under which the margin of a pair is not DPO's.
_OTHER_MARGINS = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}


@dataclass
class PopRiskDPOConfig(PairOptions, DPOConfig):
    """`trl.DPOConfig` for preference data with wrong labels: loss, optimizer and stop.

    With `optim="adamw_torch", noise="off", stop=False` training is that of `trl.DPOTrainer`, bit
    for bit.

    The noise modes stand in for the term `sigmoid` of `loss_type`; other terms of the list (`sft`,
    ...) and an auxiliary loss stay as they are, and so does the loss of evaluations. With h the
    margin of a pair in reward units, s the logistic function and e the noise rate:

    | `noise` | loss of a pair |
    |---|---|
    | "off" | -log s(h), TRL's own |
    | "cdpo" | -(1 - e) log s(h) - e log s(-h) |
    | "rdpo" | -log s(h) - e / (1 - 2e) min(h, `rdpo_max_margin`) |
    | "holder" | s(h)^(1+g) + s(-h)^(1+g) - (1 + 1/g) s(h)^g, over 1 + g; g is `holder_gamma` |
    | "weights" | w (-log s(h)) with w from `pair_weight_column`; without the column
                  -w log s(h) - (1 - w) log s(-h) with w the probability that the label is right |
    | "auto" | estimate e and report it; the loss is the one that `recipes/benchmarks/noisy_dpo`
               favours beside gate and stop, which is TRL's own |

    Where `noise_rate` is None, e is estimated after half of the first epoch and at its end, from
    margins of pairs that had not been trained on; until then, and where the margins do not tell the
    rate, the loss is TRL's own.

    Args:
        optim: Any name that transformers knows; `poprisk_adamw` by default, with `optim_args` as
            in `poprisk_integrations.huggingface`. Where they name no boundary it is
            `false_open_rate=0.05`, stricter than the optimizer's own: it is the one that was
            measured on preferences with wrong labels (`recipes/benchmarks/noisy_dpo`).
        noise: What to do about wrong labels in the loss, see above.
        noise_rate: Share of wrong labels in [0, 0.5), if it is known; None to estimate it.
        pair_id_column: Column with a unique id per pair, for the flip report; None to call pairs
            by their row number.
        pair_weight_column: Column with a weight >= 0 per pair, a factor of its loss in every mode.
            It is used as given: with weights of mean 1 learning rates keep their meaning.
        rdpo_max_margin: Margin at which the push of "rdpo" ends, reward units, > 0. None for the
            published loss, which has no finite optimum; it then needs `stop=True`.
        holder_gamma: g of "holder", > 0.
        on_policy_kl_samples: Prompts from which to sample, at the end of training and after each
            evaluation, for `poprisk/kl_on_policy`; 0 for none.
        auto_learning_rate: Search for the learning rate before training, from `learning_rate` on
            and without an eval set, see `suggest_learning_rate`: four or five short trainings, a
            line, and `poprisk_learning_rate.json` in `output_dir`. A resumed run keeps its rate.
        stop: Add `PopRiskEarlyStoppingCallback`, with the options below, unless one was passed to
            the trainer. It estimates loss, reward accuracy and reward margin on pairs that were
            never trained on, along the run and without an eval set.
        stop_criterion: "risk" (the run ends where the estimated test loss has been above its
            smallest value), "signal" (where the gradients carry only noise), or "auto": "risk"
            where it can be had, else "signal".
        stop_sit_out: Of "risk": share of the pairs that are trained on late, and are measured
            before, in (0, 0.5].
        stop_patience: Of "risk": windows without a smaller estimate before the stop, >= 1.
        stop_kappa: Of "signal": stop at this multiple of the onset time, >= 1. The default is 1,
            where the callback's own is 2: on noisy preferences the accuracy on clean pairs is best
            at the onset (`recipes/benchmarks/noisy_dpo`). The reward of samples goes on rising for
            a while, and with it the distance from the reference: for that use 2.
        stop_window: Of "signal": optimizer steps per window of the statistic, >= 4, or "auto": a
            third of an epoch, at least 8.
        stop_threshold: Of "signal": the onset is where the statistic falls below this, > 0.
        stop_min_steps: No stop before this many optimizer steps.
        stop_action: "stop" ends the run; "cooldown" goes back to the best weights, anneals the
            learning rate to zero and then ends it; "monitor" only logs (pairs still sit out). None:
            "cooldown" with the estimate (under DeepSpeed "stop"), "stop" with
            `stop_criterion="signal"`, and where "auto" cannot have the estimate nothing is ended.
        stop_restore: Which checkpoint is the run's best: "best", "stop", "onset" or None ("none" in
            YAML and on the command line), see `PopRiskEarlyStoppingCallback`.

    Raises:
        ValueError: If an option is outside its range, without effect (`label_smoothing` with
            losses that ignore it), or does not go with the noise mode.
    """

    noise: str = option("auto", "What to do about wrong labels in the loss.", MODES)
    pair_weight_column: str | None = option(
        None, "Column with a weight >= 0 per pair, a factor of its loss."
    )
    rdpo_max_margin: float | None = option(
        4.0, "Margin at which the push of noise='rdpo' ends, reward units."
    )
    holder_gamma: float = option(
        2.0, "Exponent of noise='holder'; larger forgives contradictions earlier."
    )
    on_policy_kl_samples: int = option(
        0, "Prompts from which to sample for the on-policy KL; 0 for none."
    )
    auto_learning_rate: bool = option(
        False, "Search for the learning rate before training, from learning_rate on."
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_noise()
        self._check_label_smoothing()
        self._check_stop()
        super().__post_init__()
        self.optim_args = self._with_gate(self.optim_args)
        if self.on_policy_kl_samples:
            self._check_sharded(
                f"Invalid on_policy_kl_samples: {self.on_policy_kl_samples}. Sampling needs the "
                "whole model on each device: set it to 0 under FSDP and DeepSpeed."
            )
        if self.auto_learning_rate:
            self._check_sharded(
                "Invalid auto_learning_rate: True. Under FSDP and DeepSpeed weights cannot be put "
                "back after a search: search on one device or under DDP."
            )

    @property
    def pair_loss(self) -> PairLoss:
        """The noise mode with its options."""
        return PairLoss(mode=self.noise, max_margin=self.rdpo_max_margin, gamma=self.holder_gamma)

    @property
    def loss_is_replaced(self) -> bool:
        """Whether the term `sigmoid` of the loss may become another one in this run."""
        mode = AUTO_MODE if self.noise == "auto" else self.noise
        if mode == "off" and self.pair_weight_column is None:
            return False
        # The default must not get in anyone's way.
        return self.noise != "auto" or self._noise_obstacle() is None

    @property
    def pair_values_refusal(self) -> str:
        """Why a run has no loss of each pair, or none that compares between windows; or ""."""
        unknown = self._unknown_margin()
        if unknown is not None:
            return f"with {unknown[0]}={unknown[1]!r} the loss of each pair is not known"
        if getattr(self, "sync_ref_model", False):
            return "with sync_ref_model the reference moves, and losses do not compare"
        return ""

    def _unknown_margin(self) -> tuple[str, object] | None:
        """The option, and its value, under which the pairs have no margin of DPO, or hide it."""
        if "sigmoid" not in self.loss_type:
            return "loss_type", self.loss_type
        for name, allowed in _OTHER_MARGINS.items():
            value = getattr(self, name, allowed)
            if getattr(value, "value", value) != allowed:
                return name, value
        if self.use_liger_kernel and LIGER_HIDES_LOG_PROBS:
            return "use_liger_kernel", True
        return None

    def _check_noise(self) -> None:
        self._check_noise_mode(MODES, without_rate=("off", "holder"))
        for name in ("rdpo_max_margin", "holder_gamma"):
            value = getattr(self, name)
            if not (value is None and name == "rdpo_max_margin") and not 0.0 < value < math.inf:
                raise ValueError(f"Invalid {name}: {value}. Must be > 0.")
        if self.pair_weight_column is not None and self.noise == "off":
            raise ValueError(
                f"Invalid pair_weight_column: {self.pair_weight_column!r}. noise='off' makes no "
                "use of it: set noise='weights'."
            )
        if self.noise == "rdpo" and self.rdpo_max_margin is None and not self.stop:
            raise ValueError(
                "Invalid rdpo_max_margin: None. With stop=False nothing bounds the loss of "
                "noise='rdpo': give a margin, e.g. 4.0, or set stop=True."
            )
        if self.on_policy_kl_samples < 0:
            raise ValueError(
                f"Invalid on_policy_kl_samples: {self.on_policy_kl_samples}. Must be >= 0."
            )
        obstacle = self._noise_obstacle()
        needed = self.noise not in ("off", "auto") or self.pair_weight_column is not None
        if needed and obstacle is not None:
            raise ValueError(obstacle)

    def _noise_obstacle(self) -> str | None:
        """Why the loss of the pairs cannot be replaced, or None if it can."""
        what = f"noise={self.noise!r}"
        if self.noise == "auto":
            what = f"pair_weight_column={self.pair_weight_column!r}"
        if len(set(self.loss_type)) < len(self.loss_type):
            return f"Invalid loss_type: {self.loss_type}. With {what} each may occur once."
        unknown = self._unknown_margin()
        if unknown is None:
            return None
        name, value = unknown
        fault = f"Invalid {name}: {value!r}. "
        if name == "loss_type":
            return fault + (
                f"{what} stands in for the loss 'sigmoid', which must be among them; other losses "
                "have no form for wrong labels here. Use loss_type='sigmoid', alone or in a list, "
                "or noise='off'."
            )
        if name == "use_liger_kernel":
            return fault + (
                f"In this version of TRL it hides the margins of the pairs, which {what} needs: "
                "set it to False, or noise='off', or update TRL."
            )
        return fault + (
            f"Under it the margin of a pair is not DPO's, which {what} needs: leave it out, or set "
            "noise='off'."
        )

    def _check_sharded(self, message: str) -> None:
        if self.fsdp or self.deepspeed_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP"):
            raise ValueError(message)

    def _check_label_smoothing(self) -> None:
        if not self.label_smoothing or _SMOOTHED_LOSSES & set(self.loss_type):
            return
        problem = (
            f"Invalid label_smoothing: {self.label_smoothing}. TRL >= 0.29 ignores it with "
            f"loss_type={self.loss_type}. For wrong labels leave it out and give the rate as "
            f"noise_rate={self.label_smoothing} with noise='cdpo' (the former meaning) or "
            "noise='rdpo'."
        )
        # Of the other losses nobody expects it, and "off" refuses nothing that TRL accepts.
        if self.noise != "off" or "sigmoid" in self.loss_type:
            raise ValueError(problem)
        logger.warning("%s", problem)
