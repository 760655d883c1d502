"""Pure functions and frozen dataclasses: gate, noise, risk, window statistic, stopping rule."""

from poprisk_integrations.core.alpha import (
    calibrated_alpha,
    chi2_quantile_1dof,
    finite_alpha,
    resolve_alpha,
)
from poprisk_integrations.core.diagnosis import PHRASES, Diagnosis, diagnose
from poprisk_integrations.core.gate import default_lambda_pop, gate_factor, open_mask
from poprisk_integrations.core.learning_rate_cut import (
    LearningRateCutConfig,
    LearningRateCutRule,
    LearningRateCutState,
)
from poprisk_integrations.core.noise import (
    deviation_scale,
    ema_mean_variance,
    gradient_scale,
    noise_is_ready,
    sum_variance,
    update_dev_sq_,
)
from poprisk_integrations.core.risk import (
    lagged_risk_decrease,
    population_risk_decrease,
    risk_decrease_from_ranks,
    risk_decrease_from_sums,
    risk_decrease_variance,
    risk_decrease_weighted,
)
from poprisk_integrations.core.standard_error import mean_standard_error
from poprisk_integrations.core.stopping import (
    StoppingConfig,
    StoppingDecision,
    StoppingRule,
    StoppingState,
)
from poprisk_integrations.core.window import WindowRatio, coordinate_ratio, window_signal_ratio

__all__ = [
    "PHRASES",
    "Diagnosis",
    "LearningRateCutConfig",
    "LearningRateCutRule",
    "LearningRateCutState",
    "StoppingConfig",
    "StoppingDecision",
    "StoppingRule",
    "StoppingState",
    "WindowRatio",
    "calibrated_alpha",
    "chi2_quantile_1dof",
    "coordinate_ratio",
    "default_lambda_pop",
    "deviation_scale",
    "diagnose",
    "ema_mean_variance",
    "finite_alpha",
    "gate_factor",
    "gradient_scale",
    "lagged_risk_decrease",
    "mean_standard_error",
    "noise_is_ready",
    "open_mask",
    "population_risk_decrease",
    "resolve_alpha",
    "risk_decrease_from_ranks",
    "risk_decrease_from_sums",
    "risk_decrease_variance",
    "risk_decrease_weighted",
    "sum_variance",
    "update_dev_sq_",
    "window_signal_ratio",
]
