"""Pure functions and frozen dataclasses: gate, noise, risk, test loss, stopping rules."""

from poprisk_integrations.core.diagnosis import PHRASES, Diagnosis, diagnose
from poprisk_integrations.core.gate import (
    calibrated_alpha,
    chi2_quantile_1dof,
    default_lambda_pop,
    finite_alpha,
    gate_factor,
    open_mask,
    resolve_alpha,
)
from poprisk_integrations.core.learning_rate_cut import (
    LearningRateCutConfig,
    LearningRateCutRule,
    LearningRateCutState,
)
from poprisk_integrations.core.noise import (
    deviation_scale,
    ema_mean_variance,
    gradient_scale,
    moments_noise,
    noise_is_ready,
    sum_variance,
    update_dev_sq_,
)
from poprisk_integrations.core.noise_law import (
    effective_coordinates,
    moments_alpha,
    moments_open_rate,
    pooled_alpha,
)
from poprisk_integrations.core.risk_curve import (
    RiskEstimate,
    RiskTrend,
    first_pass_estimate,
    late_joiner_estimate,
    risk_trend,
)
from poprisk_integrations.core.risk_stopping import (
    RiskDecision,
    RiskStopping,
    RiskStoppingConfig,
    RiskStoppingState,
)
from poprisk_integrations.core.sit_out_schedule import first_epochs
from poprisk_integrations.core.stopping import (
    StoppingConfig,
    StoppingDecision,
    StoppingRule,
    StoppingState,
)
from poprisk_integrations.core.window import (
    WindowRatio,
    coordinate_ratio,
    mean_standard_error,
    window_signal_ratio,
)

__all__ = [
    "PHRASES",
    "Diagnosis",
    "LearningRateCutConfig",
    "LearningRateCutRule",
    "LearningRateCutState",
    "RiskDecision",
    "RiskEstimate",
    "RiskStopping",
    "RiskStoppingConfig",
    "RiskStoppingState",
    "RiskTrend",
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
    "effective_coordinates",
    "ema_mean_variance",
    "finite_alpha",
    "first_epochs",
    "first_pass_estimate",
    "gate_factor",
    "gradient_scale",
    "late_joiner_estimate",
    "mean_standard_error",
    "moments_alpha",
    "moments_noise",
    "moments_open_rate",
    "noise_is_ready",
    "open_mask",
    "pooled_alpha",
    "resolve_alpha",
    "risk_trend",
    "sum_variance",
    "update_dev_sq_",
    "window_signal_ratio",
]
