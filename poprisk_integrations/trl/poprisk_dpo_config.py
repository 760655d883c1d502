"""Settings of PopRiskDPOTrainer: TRL's, our optimizer by default, and the stop."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

from dataclasses import dataclass, field

from transformers.training_args import OptimizerNames
from trl import DPOConfig

from poprisk_integrations.huggingface.optim_args import parse_optim_args
from poprisk_integrations.trl.early_stopping import stopping_callback

__all__ = ["PopRiskDPOConfig"]

# The losses of TRL that read `label_smoothing`. All others ignore it without a word.
_SMOOTHED_LOSSES = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})


@dataclass
class PopRiskDPOConfig(DPOConfig):
    """`trl.DPOConfig` with a gated optimizer and a stop that needs no validation data.

    With `optim="adamw_torch", stop=False` training is that of `trl.DPOTrainer`, bit for bit.

    Args:
        optim: Any name that transformers knows; `poprisk_adamw` by default, with `optim_args` as
            in `poprisk_integrations.huggingface`.
        noise: What to do about wrong labels in the loss. Only "off" in this version.
        noise_rate: Must be None in this version.
        pair_id_column: Must be None in this version.
        pair_weight_column: Must be None in this version.
        stop: Add `PopRiskEarlyStoppingCallback`, with the options below, unless one was passed to
            the trainer.
        stop_kappa: Stop at this multiple of the onset time, >= 1.
        stop_window: Optimizer steps per window of the statistic, >= 4, or "auto": a third of an
            epoch, at least 8.
        stop_threshold: The onset is where the statistic falls below this, > 0.
        stop_min_steps: No stop before this many optimizer steps.
        stop_action: "stop" ends the run, "monitor" only logs.
        stop_restore: Which checkpoint is the run's best: "stop", "onset" or None ("none" in YAML
            and on the command line), see `PopRiskEarlyStoppingCallback`.

    Raises:
        ValueError: If an option is not available, outside its range, or without effect:
            `label_smoothing` with losses that ignore it.
    """

    optim: OptimizerNames | str = field(
        default="poprisk_adamw",
        metadata={"help": "The optimizer: any name that transformers knows."},
    )
    noise: str = field(
        default="off",
        metadata={"help": "Correction of the loss for wrong labels. Only 'off' in this version."},
    )
    noise_rate: float | None = field(
        default=None,
        metadata={"help": "Share of wrong labels. Must be left out in this version."},
    )
    pair_id_column: str | None = field(
        default=None,
        metadata={"help": "Column with an id per pair. Must be left out in this version."},
    )
    pair_weight_column: str | None = field(
        default=None,
        metadata={"help": "Column with a weight per pair. Must be left out in this version."},
    )
    stop: bool = field(
        default=True,
        metadata={"help": "Stop without validation data, when the gradients carry only noise."},
    )
    stop_kappa: float = field(
        default=2.0,
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
        if OptimizerNames(self.optim).value.startswith("poprisk_"):
            parse_optim_args(self.optim_args)  # now, not after the model is loaded
        if self.stop and self.deepspeed_plugin is not None:
            raise ValueError(
                "Invalid stop: True. DeepSpeed shows no gradients to callbacks: set stop=False, or "
                "train with DDP or FSDP."
            )

    def _check_noise(self) -> None:
        noise: object = self.noise
        if noise is False:  # how YAML reads a bare `off`
            self.noise = "off"
        if self.noise != "off":
            raise ValueError(
                f"Invalid noise: {self.noise!r}. Only 'off' is available in this version."
            )
        for name in ("noise_rate", "pair_id_column", "pair_weight_column"):
            value = getattr(self, name)
            if value is not None:
                raise ValueError(
                    f"Invalid {name}: {value!r}. It is not available in this version: leave it out."
                )

    def _check_label_smoothing(self) -> None:
        if self.label_smoothing and not _SMOOTHED_LOSSES & set(self.loss_type):
            raise ValueError(
                f"Invalid label_smoothing: {self.label_smoothing}. TRL >= 0.29 ignores it with "
                f"loss_type={self.loss_type}. For wrong labels use loss_type='robust' with this "
                "label_smoothing as the flip rate (and keep stop=True: that loss has no finite "
                "optimum); otherwise set label_smoothing=0."
            )

    def _check_stop(self) -> None:
        if isinstance(self.stop_window, str) and self.stop_window.isdigit():
            self.stop_window = int(self.stop_window)  # the command line passes text
        if self.stop_window is None:
            self.stop_window = "auto"
        if self.stop_restore == "none":
            self.stop_restore = None
        stopping_callback(self)
