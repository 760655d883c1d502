"""What a user asks of the stop without validation data: checked once, for every framework."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

from poprisk_integrations.core.risk_stopping import RiskStoppingConfig
from poprisk_integrations.core.stopping import StoppingConfig

__all__ = [
    "SHORTEST_WINDOW",
    "StopArguments",
    "StopOptions",
    "check_choice",
    "check_epoch_steps",
    "check_window",
]

SHORTEST_WINDOW = 4  # steps; with fewer, the variance of a coordinate has no mean inverse


@dataclass(eq=False, repr=False)
class StopOptions:
    """Arguments of `PopRiskEarlyStoppingCallback` and `PopRiskEarlyStopping`, explained there.

    Raises:
        ValueError: If a value is outside its range, or does not go with the criterion.

    Example:
        >>> StopOptions(criterion="signal", kappa=3.0).signal_config().kappa
        3.0
    """

    criterion: Literal["auto", "risk", "signal"] = "auto"
    sit_out: float = 0.15
    patience: int = 10
    action: Literal["stop", "cooldown", "monitor"] | None = None
    restore: Literal["best", "stop", "onset"] | None = "best"
    window: int | Literal["auto"] = "auto"
    kappa: float = 2.0
    threshold: float = 1.0
    min_steps: int = 0
    accumulator: Literal["auto", "exact", "sample"] = "auto"
    epoch_steps: int | None = None
    example_losses: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, ("auto", "risk", "signal"))
        is_number = isinstance(self.sit_out, (int, float)) and not isinstance(self.sit_out, bool)
        if not is_number or not 0.0 < self.sit_out <= 0.5:
            raise ValueError(f"Invalid sit_out: {self.sit_out!r}. Must be a number in (0, 0.5].")
        if type(self.patience) is not int or self.patience < 1:
            raise ValueError(f"Invalid patience: {self.patience!r}. Must be an integer >= 1.")
        check_choice("action", self.action, ("stop", "cooldown", "monitor", None))
        check_choice("restore", self.restore, ("best", "stop", "onset", None))
        if self.restore == "onset" and self.criterion == "risk":
            raise ValueError("Invalid restore: 'onset'. With criterion='risk' there is no onset.")
        window: Any = self.window
        if window != "third":  # of a pass, however long the run: what DPO makes of "auto"
            check_window(window)
        check_choice("accumulator", self.accumulator, ("auto", "exact", "sample"))
        check_epoch_steps(self.epoch_steps)
        if self.example_losses is not None and not callable(self.example_losses):
            raise ValueError(
                f"Invalid example_losses: {self.example_losses!r}. Must be None or a function of "
                "(model, batch)."
            )
        self.signal_config()

    @classmethod
    def named(cls, prefix: str, options: Mapping[str, Any]) -> "StopOptions":
        """The same from options that a user knows by longer names, as errors then call them."""
        try:
            return cls(**options)
        except ValueError as error:
            raise ValueError(str(error).replace("Invalid ", f"Invalid {prefix}", 1)) from None

    @property
    def asks_for_signal(self) -> bool:
        """Whether the gradients are to decide: the estimate has no onset to restore."""
        return self.criterion == "signal" or self.restore == "onset"

    def arguments(self) -> dict[str, Any]:
        """By name, for a constructor."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def signal_config(self) -> StoppingConfig:
        """Of the rule of "signal"; what arms it moves with the threshold."""
        defaults = StoppingConfig()
        return StoppingConfig(
            kappa=self.kappa,
            threshold=self.threshold,
            arm_threshold=defaults.arm_threshold * self.threshold,
            rearm_threshold=defaults.rearm_threshold * self.threshold,
            min_steps=self.min_steps,
        )

    def risk_config(self) -> RiskStoppingConfig:
        """Of the rule of "risk"."""
        return RiskStoppingConfig(patience=self.patience, min_steps=self.min_steps)


class StopArguments(StopOptions):
    """The constructor of the callbacks: each argument is an attribute, all are in `options`."""

    def __post_init__(self) -> None:
        # A copy of its own: callbacks change attributes while a run lasts.
        self.options = StopOptions(**self.arguments())
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        """Everything that a run leaves behind is as it was made."""
        raise NotImplementedError


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError for a value that is not on the list."""
    if value not in allowed:
        raise ValueError(f"Invalid {name}: {value!r}. Must be one of {allowed}.")


def check_window(window: Any) -> None:
    """Raise ValueError for what is neither "auto" nor a length."""
    if window != "auto" and (type(window) is not int or window < SHORTEST_WINDOW):
        raise ValueError(
            f"Invalid window: {window!r}. Must be 'auto' or an integer >= {SHORTEST_WINDOW}."
        )


def check_epoch_steps(epoch_steps: Any) -> None:
    """Raise ValueError for what is neither None nor a length."""
    if epoch_steps is not None and (type(epoch_steps) is not int or epoch_steps < 1):
        raise ValueError(f"Invalid epoch_steps: {epoch_steps!r}. Must be None or an integer >= 1.")
