"""When to cut the learning rate without validation data: stationary, but not memorising."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from poprisk_integrations.core._plain import check_settings, known_fields

__all__ = ["LearningRateCutConfig", "LearningRateCutRule", "LearningRateCutState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateCutConfig:
    """Settings of the rule.

    Args:
        factor: The learning rate is multiplied by it, in (0, 1).
        patience: Stationary windows in a row before a cut, >= 1.
        confidence: Standard errors that count as significant, >= 0.
        max_cuts: No more cuts than this, >= 1.

    Raises:
        ValueError: If a value is outside its range.
    """

    factor: float = 0.3
    patience: int = 2
    confidence: float = 1.0
    max_cuts: int = 3

    def __post_init__(self) -> None:
        check_settings(
            self,
            factor=(0.0 < self.factor < 1.0, "in (0, 1)"),
            patience=(self.patience >= 1, ">= 1"),
            confidence=(self.confidence >= 0.0, ">= 0"),
            max_cuts=(self.max_cuts >= 1, ">= 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateCutState:
    """Everything the rule remembers: plain numbers, ready for JSON."""

    stationary_windows: int = 0  # in a row, up to now
    cuts: int = 0
    last_cut_step: int | None = None
    reason: str = "no cut yet"  # about the last cut


class LearningRateCutRule:
    """Cut when steps gain nothing any more although the batches agree on a direction.

    Per window, with the standard errors of `diagnostics.GradientWindow`:
        stationary        C <= z * se(C): repeating the last step would not lower the loss
        not memorising    U >  z * se(U): gradients of consecutive batches point the same way
        cut               both, in `patience` windows in a row
    C is the lagged cross product of displacement and fresh gradient (the test of SASA, Lang et
    al. 2019, arXiv:1909.09785, in this package's terms), U the product of gradients one step
    apart. C <= 0 < U says that steps overshoot: what one gains the next undoes. C <= 0 and
    U <= 0 is the end of the signal, or memorising, and no reason to cut.

    Args:
        config: Settings; the defaults are those of `LearningRateCutConfig`.

    Example:
        >>> rule = LearningRateCutRule(LearningRateCutConfig(patience=2))
        >>> window = {"risk_decrease": -0.1, "risk_decrease_se": 0.02}
        >>> window |= {"agreement": 0.05, "agreement_se": 0.01}
        >>> [rule.update(step=step, **window) for step in (10, 20)]
        [False, True]
    """

    def __init__(self, config: LearningRateCutConfig | None = None) -> None:
        self.config = config if config is not None else LearningRateCutConfig()
        self.state = LearningRateCutState()

    def update(
        self,
        *,
        step: int,
        risk_decrease: float,
        risk_decrease_se: float,
        agreement: float,
        agreement_se: float,
    ) -> bool:
        """Account for a window.

        Args:
            step: Optimizer steps so far.
            risk_decrease: C, mean over the window.
            risk_decrease_se: Its standard error.
            agreement: U, mean over the window.
            agreement_se: Its standard error.

        Returns:
            Whether to multiply the learning rate by `factor` now. NaN measures count as no window.
        """
        values = (risk_decrease, risk_decrease_se, agreement, agreement_se)
        if self.state.cuts >= self.config.max_cuts or any(math.isnan(v) for v in values):
            return False
        z = self.config.confidence
        overshoots = risk_decrease <= z * risk_decrease_se and agreement > z * agreement_se
        count = self.state.stationary_windows + 1 if overshoots else 0
        if count < self.config.patience:
            self.state = replace(self.state, stationary_windows=count)
            return False
        self.state = replace(
            self.state,
            stationary_windows=0,
            cuts=self.state.cuts + 1,
            last_cut_step=step,
            reason=f"learning rate cut at step {step}: steps gain nothing any more (C = "
            f"{risk_decrease:.2g} +- {risk_decrease_se:.2g}) although batches agree (U = "
            f"{agreement:.2g} +- {agreement_se:.2g})",
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and None: safe for JSON and `weights_only` loading."""
        return asdict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; keys that an older version did not write keep their defaults."""
        self.state = LearningRateCutState(**known_fields(LearningRateCutState, state_dict))
