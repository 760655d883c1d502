"""Settings of PopRiskDPOTrainer: TRL's, our optimizer, the noise mode, and the stop."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import logging
import math
import os
from dataclasses import dataclass, field

from transformers.training_args import OptimizerNames
from trl import DPOConfig

from poprisk_integrations.huggingface.optim_args import parse_optim_args
from poprisk_integrations.trl._upstream import LIGER_HIDES_LOG_PROBS
from poprisk_integrations.trl.early_stopping import stopping_callback
from poprisk_integrations.trl.pair_loss import AUTO_MODE, MODES, PairLoss

__all__ = ["PopRiskDPOConfig"]

logger = logging.getLogger(__name__)

# The losses of TRL that read `label_smoothing`. All others ignore it without a word.
_SMOOTHED_LOSSES = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})
# The gate that was measured on preferences with wrong labels.
_BOUNDARY = "false_open_rate=0.05"
# Options of TRL under which the margin of a pair is not DPO's.
_OTHER_MARGINS = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}


@dataclass
class PopRiskDPOConfig(DPOConfig):
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
        stop: Add `PopRiskEarlyStoppingCallback`, with the options below, unless one was passed to
            the trainer.
        stop_kappa: Stop at this multiple of the onset time, >= 1. The default is 1, where the
            callback's own is 2: on noisy preferences the accuracy on clean pairs is best at the
            onset (`recipes/benchmarks/noisy_dpo`). The reward of samples goes on rising for a
            while, and with it the distance from the reference: for that use 2.
        stop_window: Optimizer steps per window of the statistic, >= 4, or "auto": a third of an
            epoch, at least 8.
        stop_threshold: The onset is where the statistic falls below this, > 0.
        stop_min_steps: No stop before this many optimizer steps.
        stop_action: "stop" ends the run, "monitor" only logs.
        stop_restore: Which checkpoint is the run's best: "stop", "onset" or None ("none" in YAML
            and on the command line), see `PopRiskEarlyStoppingCallback`.

    Raises:
        ValueError: If an option is outside its range, without effect (`label_smoothing` with
            losses that ignore it), or does not go with the noise mode.
    """

    optim: OptimizerNames | str = field(
        default="poprisk_adamw",
        metadata={"help": "The optimizer: any name that transformers knows."},
    )
    noise: str = field(
        default="auto",
        metadata={"help": "What to do about wrong labels in the loss.", "choices": list(MODES)},
    )
    noise_rate: float | None = field(
        default=None,
        metadata={"help": "Share of wrong labels in [0, 0.5); left out, it is estimated."},
    )
    pair_id_column: str | None = field(
        default=None,
        metadata={"help": "Column with a unique id per pair, for the flip report."},
    )
    pair_weight_column: str | None = field(
        default=None,
        metadata={"help": "Column with a weight >= 0 per pair, a factor of its loss."},
    )
    rdpo_max_margin: float | None = field(
        default=4.0,
        metadata={"help": "Margin at which the push of noise='rdpo' ends, reward units."},
    )
    holder_gamma: float = field(
        default=2.0,
        metadata={"help": "Exponent of noise='holder'; larger forgives contradictions earlier."},
    )
    on_policy_kl_samples: int = field(
        default=0,
        metadata={"help": "Prompts from which to sample for the on-policy KL; 0 for none."},
    )
    stop: bool = field(
        default=True,
        metadata={"help": "Stop without validation data, when the gradients carry only noise."},
    )
    stop_kappa: float = field(
        default=1.0,
        metadata={"help": "Stop at this multiple of the time at which the signal faded, >= 1."},
    )
    # `int | str | None`, since the argument parser would read `int | str` as int alone.
    stop_window: int | str | None = field(
        default="auto",
        metadata={
            "help": "Optimizer steps per window of the statistic, or 'auto': a third of an epoch, "
            "at least 8."
        },
    )
    stop_threshold: float = field(
        default=1.0,
        metadata={"help": "The signal has faded where the statistic falls below this."},
    )
    stop_min_steps: int = field(
        default=0,
        metadata={"help": "No stop before this many optimizer steps."},
    )
    stop_action: str = field(
        default="stop",
        metadata={
            "help": "'stop' ends the run, 'monitor' only logs.",
            "choices": ["stop", "monitor"],
        },
    )
    stop_restore: str | None = field(
        default="stop",
        metadata={
            "help": "The run's best checkpoint: that of the 'stop', of the 'onset', or 'none'.",
            "choices": ["stop", "onset", "none"],
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_noise()
        self._check_label_smoothing()
        self._check_stop()
        super().__post_init__()
        optim = OptimizerNames(self.optim).value
        if optim.startswith("poprisk_"):
            options = parse_optim_args(self.optim_args)  # now, not after the model is loaded
            named = {"alpha", "false_open_rate"} & options.keys()
            if not named and optim != "poprisk_adamw_paper":
                self.optim_args = ",".join(filter(None, (self.optim_args, _BOUNDARY)))
        if self.on_policy_kl_samples:
            self._check_on_policy_kl()

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

    def _check_noise(self) -> None:
        noise: object = self.noise
        if noise is False:  # how YAML reads a bare `off`
            self.noise = "off"
        if self.noise not in MODES:
            raise ValueError(f"Invalid noise: {self.noise!r}. Must be one of {MODES}.")
        if self.noise_rate is not None and not 0.0 <= self.noise_rate < 0.5:
            raise ValueError(
                f"Invalid noise_rate: {self.noise_rate}. Must be in [0, 0.5), or None to estimate."
            )
        if self.noise_rate is not None and self.noise in ("off", "holder"):
            raise ValueError(
                f"Invalid noise_rate: {self.noise_rate}. noise={self.noise!r} makes no use of it: "
                "leave it out."
            )
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
        if "sigmoid" not in self.loss_type:
            return (
                f"Invalid loss_type: {self.loss_type}. {what} stands in for the loss 'sigmoid', "
                "which must be among them; other losses have no form for wrong labels here. Use "
                "loss_type='sigmoid', alone or in a list, or noise='off'."
            )
        if len(set(self.loss_type)) < len(self.loss_type):
            return f"Invalid loss_type: {self.loss_type}. With {what} each may occur once."
        for name, allowed in _OTHER_MARGINS.items():
            value = getattr(self, name, allowed)
            if getattr(value, "value", value) != allowed:
                return (
                    f"Invalid {name}: {value!r}. Under it the margin of a pair is not DPO's, which "
                    f"{what} needs: leave it out, or set noise='off'."
                )
        if self.use_liger_kernel and LIGER_HIDES_LOG_PROBS:
            return (
                "Invalid use_liger_kernel: True. In this version of TRL it hides the margins of "
                f"the pairs, which {what} needs: set it to False, or noise='off', or update TRL."
            )
        return None

    def _check_on_policy_kl(self) -> None:
        if self.fsdp or self.deepspeed_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP"):
            raise ValueError(
                f"Invalid on_policy_kl_samples: {self.on_policy_kl_samples}. Sampling needs the "
                "whole model on each device: set it to 0 under FSDP and DeepSpeed."
            )

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

    def _check_stop(self) -> None:
        if isinstance(self.stop_window, str) and self.stop_window.isdigit():
            self.stop_window = int(self.stop_window)  # the command line passes text
        if self.stop_window is None:
            self.stop_window = "auto"
        if self.stop_restore == "none":
            self.stop_restore = None
        stopping_callback(self)
