"""Settings that our trainers of preference pairs share: optimizer, noise, ids, and the stop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import OptimizerNames

from poprisk_integrations.diagnostics.stop_options import StopOptions
from poprisk_integrations.huggingface.optim_args import parse_optim_args

__all__ = ["PairOptions", "option"]

# The options of the stop, `stop_criterion` and so on.
_STOP = (
    "criterion", "sit_out", "patience", "action", "restore", "window", "kappa", "threshold",
    "min_steps",
)  # fmt: skip
# The gate that was measured on preferences with wrong labels.
_BOUNDARY = "false_open_rate=0.05"


def option(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """A field as the command line shows it."""
    metadata: dict[str, Any] = {"help": help}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass
class PairOptions:
    """Fields for a config of TRL's, before which it stands among the bases.

    `PopRiskDPOConfig` says what they mean. Its `__post_init__` calls the checks.
    """

    optim: OptimizerNames | str = field(
        default="poprisk_adamw",
        metadata={"help": "The optimizer: any name that transformers knows."},
    )
    noise: str = option("auto", "What to do about wrong labels.")
    noise_rate: float | None = option(
        None, "Share of wrong labels in [0, 0.5); left out, it is estimated."
    )
    pair_id_column: str | None = option(
        None, "Column with a unique id per pair, for the flip report."
    )
    stop: bool = option(
        True, "Estimate the test loss without an eval set, and stop where it rises."
    )
    stop_criterion: str = option(
        "auto",
        "'risk' (the estimated test loss), 'signal' (the gradients carry only noise), or 'auto': "
        "'risk' where it can be had.",
        ("auto", "risk", "signal"),
    )
    stop_sit_out: float = option(
        0.15, "Share of the pairs that are trained on late, and measured before."
    )
    stop_patience: int = option(10, "Windows without a smaller estimate before the stop, >= 1.")
    stop_kappa: float = option(
        1.0, "Stop at this multiple of the time at which the signal faded, >= 1."
    )
    # `int | str | None`, since the argument parser would read `int | str` as int alone.
    stop_window: int | str | None = option(
        "auto",
        "Optimizer steps per window of the statistic, or 'auto': a third of an epoch, at least 8.",
    )
    stop_threshold: float = option(
        1.0, "The signal has faded where the statistic falls below this."
    )
    stop_min_steps: int = option(0, "No stop before this many optimizer steps.")
    stop_action: str | None = option(
        None,
        "'stop' ends the run, 'cooldown' anneals to zero from the best weights, 'monitor' only "
        "logs; left out, what suits the criterion.",
        ("stop", "cooldown", "monitor"),
    )
    stop_restore: str | None = option(
        "best",
        "The run's best checkpoint: the one at the smallest estimate ('best'), of the 'stop', of "
        "the 'onset', or 'none'.",
        ("best", "stop", "onset", "none"),
    )

    @property
    def stop_options(self) -> StopOptions:
        """The options of the stop, checked; errors call them as they are called here."""
        return StopOptions.named("stop_", {name: getattr(self, f"stop_{name}") for name in _STOP})

    def _check_noise_mode(self, modes: Sequence[str], without_rate: Sequence[str]) -> None:
        """`without_rate` are the modes that make no use of a noise rate."""
        noise: object = self.noise
        if noise is False:  # how YAML reads a bare `off`
            self.noise = "off"
        if self.noise not in modes:
            raise ValueError(f"Invalid noise: {self.noise!r}. Must be one of {modes}.")
        if self.noise_rate is not None and not 0.0 <= self.noise_rate < 0.5:
            raise ValueError(
                f"Invalid noise_rate: {self.noise_rate}. Must be in [0, 0.5), or None to estimate."
            )
        if self.noise_rate is not None and self.noise in without_rate:
            raise ValueError(
                f"Invalid noise_rate: {self.noise_rate}. noise={self.noise!r} makes no use of it: "
                "leave it out."
            )

    def _check_stop(self) -> None:
        if isinstance(self.stop_window, str) and self.stop_window.isdigit():
            self.stop_window = int(self.stop_window)  # the command line passes text
        if self.stop_window is None:
            self.stop_window = "auto"
        if self.stop_restore == "none":
            self.stop_restore = None
        _ = self.stop_options  # raises

    def _with_gate(self, optim_args: str | None) -> str | None:
        """`optim_args`, with the gate where they name none; ValueError for unknown options."""
        optim = OptimizerNames(self.optim).value
        if not optim.startswith("poprisk_"):
            return optim_args
        options = parse_optim_args(optim_args)  # now, not after the model is loaded
        if {"alpha", "false_open_rate"} & options.keys() or optim == "poprisk_adamw_paper":
            return optim_args
        return ",".join(filter(None, (optim_args, _BOUNDARY)))
