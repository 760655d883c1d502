"""What a study trains with: AdamW, gates, and controls that isolate a gate."""

from dataclasses import dataclass, fields
from typing import Any

from poprisk_integrations.core import calibrated_alpha, moments_alpha

__all__ = ["ARMS", "BETAS", "CONTROLS", "GATES", "Arm", "control"]

BETAS = (0.9, 0.999)
CONTROLS = ("norm", "mask", "ratio")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train; the options are those of `PopRiskAdamW`, with `alpha` as a number."""

    name: str  # in tables and file names
    gate: str = "none"
    alpha: float = 0.0
    lambda_pop: float | None = None
    rho: float = 0.99
    gate_warmup: int = 0
    gate_blend: float = 1.0
    preserve_norm: bool = False
    gate_decay: bool = False
    gate_eps: float = 0.0
    noise_mean: str = "bias_corrected"
    noise_source: str = "temporal"
    granularity: str = "coordinate"
    # Of rows and tensors, whose boundary follows how many coordinates they are worth; `alpha` is
    # then the boundary of one.
    false_open_rate: float | None = None
    control: str | None = None  # one of `CONTROLS`, which change AdamW's update, or None
    needs: str | None = None  # the arm whose recorded steps the control imitates
    # Places of the tensors that step as under AdamW, in the order of the model's.
    exempt: tuple[int, ...] = ()

    def options(self) -> dict[str, Any]:
        """Keywords for `PopRiskAdamW`, for arms that are no control."""
        harness = ("name", "control", "needs", "exempt", "false_open_rate")
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in harness}
        if self.false_open_rate is not None:
            chosen |= {"alpha": "calibrated", "false_open_rate": self.false_open_rate}
        return chosen


def calibrated(false_open_rate: float) -> float:
    """Boundary that pure noise passes with this probability."""
    return calibrated_alpha(BETAS[0], false_open_rate)


def control(kind: str, of: str) -> Arm:
    """The control of a gated arm."""
    if kind == "ratio":  # has its own gate; only the boundary is the arm's
        return Arm(name=f"ratio({of})", control=kind, alpha=GATES[of].alpha)
    return Arm(name=f"{kind}({of})", control=kind, needs=of)


_5, _32 = calibrated(0.05), calibrated(0.3173)
_MOMENTS: dict[str, Any] = {"gate": "soft", "noise_source": "moments"}
_MOMENTS_32 = {**_MOMENTS, "alpha": moments_alpha(BETAS, 0.3173)}
_PUBLISHED: dict[str, Any] = {
    "gate": "soft",
    "alpha": 1.0,
    "lambda_pop": 0.0,
    "gate_eps": 1e-12,
    "noise_mean": "raw",
}

GATES = {
    arm.name: arm
    for arm in (
        Arm(name="AdamW"),
        # Algorithm 1 as published, and the mask that the reference code is said to default to.
        Arm(name="paper", **_PUBLISHED),
        Arm(name="snr-fresh", gate="snr", alpha=1.0),
        # Calibrated: 5 %, and 32 % (the boundary at the mean's own variance), the default.
        Arm(name="soft-5", gate="soft", alpha=_5),
        Arm(name="soft-32", gate="soft", alpha=_32),
        Arm(name="hard-5", gate="hard", alpha=_5),
        Arm(name="hard-32", gate="hard", alpha=_32),
        Arm(name="snr-5", gate="snr", alpha=_5),
        Arm(name="snr-32", gate="snr", alpha=_32),
        # The same with the ungated update's norm: a direction, not a smaller step.
        Arm(name="soft-5-norm", gate="soft", alpha=_5, preserve_norm=True),
        Arm(name="soft-32-norm", gate="soft", alpha=_32, preserve_norm=True),
        Arm(name="snr-32-norm", gate="snr", alpha=_32, preserve_norm=True),
        Arm(name="snr-fresh-norm", gate="snr", alpha=1.0, preserve_norm=True),
        # One option changed, of the gate at 5 % (the default before) and at 32 %.
        Arm(name="soft-5-rho999", gate="soft", alpha=_5, rho=0.999),
        Arm(name="soft-5-warmup", gate="soft", alpha=_5, gate_warmup=100),
        Arm(name="soft-5-decay", gate="soft", alpha=_5, gate_decay=True),
        Arm(name="soft-5-blend", gate="soft", alpha=_5, gate_blend=0.5),
        Arm(name="paper-decay", gate_decay=True, **_PUBLISHED),
        Arm(name="soft-32-decay", gate="soft", alpha=_32, gate_decay=True),
        Arm(name="soft-32-rho999", gate="soft", alpha=_32, rho=0.999),
        Arm(name="soft-32-warmup", gate="soft", alpha=_32, gate_warmup=100),
        Arm(name="soft-32-blend", gate="soft", alpha=_32, gate_blend=0.5),
        # Without a third tensor, and with one gate per row or tensor.
        Arm(name="moments-32", **_MOMENTS_32),
        Arm(name="moments-5", **_MOMENTS, alpha=moments_alpha(BETAS, 0.05)),
        *(
            Arm(name=f"{prefix}{grain}-32", granularity=grain, false_open_rate=0.3173, **base)
            for prefix, base in (("", {"gate": "soft", "alpha": _32}), ("moments-", _MOMENTS_32))
            for grain in ("row", "tensor")
        ),
    )
}

ARMS = {
    **GATES,
    **{
        arm.name: arm
        for gated in ("soft-5", "soft-32", "snr-32", "snr-fresh", "paper")
        for arm in (control("norm", gated), control("mask", gated), control("ratio", gated))
    },
}
