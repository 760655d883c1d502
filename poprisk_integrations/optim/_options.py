"""Options of a parameter group: declared once, checked when a group is added, read at each step."""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core.gate import GATES, default_lambda_pop, resolve_alpha

__all__ = [
    "DEFAULTS",
    "MOMENTS",
    "PUBLISHED",
    "READ_OFF",
    "STATE_FORMATS",
    "GroupOptions",
    "check_gradients",
    "check_group",
    "check_params",
    "check_published",
    "idle_options",
    "kept_moments",
    "needs_device_step",
    "resolve_group",
    "uses_pieces",
    "uses_pooling",
]

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_dev_sq")
STATE_FORMATS = ("float32", "bfloat16", "8bit")
NOISE_MEANS = ("bias_corrected", "raw")
PUBLISHED = ("gate_eps", "noise_mean")  # options of `PopRiskAdamW.paper`, and of nothing else
PIECES = ("microbatch", "ranks")  # sources that are measured within a step, `_noise_source.py`
READ_OFF = "moments"  # the source without a state of its own: v_hat - m_hat^2
NOISE_SOURCES = ("temporal", *PIECES, READ_OFF)
GRAINS = ("coordinate", "row", "tensor")


def _is_number(value: Any, low: float = 0.0, high: float = math.inf) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and low <= float(value) < high


def _is_count(value: Any, low: int = 0, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def _is_rate(value: Any) -> bool:
    if isinstance(value, Tensor):
        # reading a number of a device would wait for it
        return value.numel() == 1 and (value.device.type != "cpu" or _is_number(float(value)))
    return _is_number(value)


def _are_betas(value: Any) -> bool:
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return is_pair and all(_is_number(beta, high=1.0) for beta in value)


def _is_state_dtype(value: Any) -> bool:
    chosen = value if isinstance(value, dict) else {MOMENTS[0]: value}
    return all(k in MOMENTS and v in (None, *STATE_FORMATS) for k, v in chosen.items())


def _rule(holds: Callable[[Any], bool], allowed: str, name: str | None = None) -> dict[str, Any]:
    """Metadata of an option: what it may be, for the computer and in words."""
    return {"holds": holds, "allowed": allowed, "name": name}


def _or_none(rule: dict[str, Any]) -> dict[str, Any]:
    return _rule(lambda v: v is None or rule["holds"](v), f"{rule['allowed']}, or None")


def _one_of(allowed: tuple[str, ...]) -> dict[str, Any]:
    return _rule(lambda v: v in allowed, f"one of {allowed}")


_RATE = _rule(_is_rate, "a number >= 0, or a tensor of one", "learning rate")
_BETAS = _rule(_are_betas, "two numbers in [0, 1)")
_NUMBER = _rule(_is_number, "a number >= 0")
_DECAY = _rule(lambda v: _is_number(v, high=1.0), "in [0, 1)")
_SHARE = _rule(lambda v: _is_number(v) and v <= 1, "in [0, 1]")
_COUNT = _rule(_is_count, "an integer >= 0")
_SIZE = _or_none(_rule(lambda v: _is_count(v, low=1), "an integer >= 1"))
_SEED = _rule(lambda v: _is_count(v, high=1 << 31), "an integer >= 0, below 2^31")
_FLAG = _rule(lambda v: isinstance(v, bool), "True or False")
_CHOICE = _rule(lambda v: v is None or isinstance(v, bool), "None, True or False")
_FORMATS = _rule(
    _is_state_dtype, f"one of {(None, *STATE_FORMATS)} or a dict with keys from {MOMENTS}"
)


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Every option of a group: its default, and what it may be; meanings are in `PopRiskAdamW`.

    Types are those of `resolve_group`, in which `alpha` and `lambda_pop` are numbers.
    """

    lr: float | Tensor = field(default=1e-3, metadata=_RATE)
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=_BETAS)
    eps: float = field(default=1e-8, metadata=_NUMBER)
    weight_decay: float = field(default=1e-2, metadata=_NUMBER)
    gate: str = field(default="soft", metadata=_one_of(GATES))
    # `core.gate.resolve_alpha` checks these two
    alpha: float = "calibrated"  # type: ignore[assignment]
    false_open_rate: float = 0.3173
    lambda_pop: float = field(default=None, metadata=_or_none(_NUMBER))  # type: ignore[assignment]
    rho: float = field(default=0.99, metadata=_DECAY)
    gate_warmup: int = field(default=0, metadata=_COUNT)
    gate_blend: float = field(default=1.0, metadata=_SHARE)
    preserve_norm: bool = field(default=False, metadata=_FLAG)
    batch_size: int | None = field(default=None, metadata=_SIZE)
    dataset_size: int | None = field(default=None, metadata=_SIZE)
    maximize: bool = field(default=False, metadata=_FLAG)
    foreach: bool | None = field(default=None, metadata=_CHOICE)
    fused: bool | None = field(default=None, metadata=_CHOICE)
    capturable: bool = field(default=False, metadata=_FLAG)
    state_dtype: str | dict[str, str] | None = field(default=None, metadata=_FORMATS)
    gate_decay: bool = field(default=False, metadata=_FLAG)
    gate_eps: float = field(default=0.0, metadata=_NUMBER)
    noise_mean: str = field(default="bias_corrected", metadata=_one_of(NOISE_MEANS))
    noise_source: str = field(default=READ_OFF, metadata=_one_of(NOISE_SOURCES))
    granularity: str = field(default="coordinate", metadata=_one_of(GRAINS))
    stochastic_rounding: bool = field(default=True, metadata=_FLAG)
    rounding_seed: int = field(default=0, metadata=_SEED)
    skip_nonfinite: bool = field(default=True, metadata=_FLAG)
    collect_stats_every: int = field(default=0, metadata=_COUNT)

    @property
    def beta1(self) -> float:
        """Decay of the first moment."""
        return self.betas[0]

    @property
    def beta2(self) -> float:
        """Decay of the second moment."""
        return self.betas[1]

    @property
    def gated(self) -> bool:
        """Whether this group's update can differ from AdamW's."""
        return self.gate != "none" and self.gate_blend > 0.0

    @property
    def centered(self) -> bool:
        """Whether deviations are taken from the bias-corrected mean; the published rule's not."""
        return self.noise_mean == "bias_corrected"

    @property
    def from_pieces(self) -> bool:
        """Whether s is up to date before the step, see `_noise_source.py`."""
        return self.noise_source in PIECES

    @property
    def from_moments(self) -> bool:
        """Whether there is no s, because the noise is v_hat - m_hat^2."""
        return self.noise_source == READ_OFF

    @property
    def pooled(self) -> bool:
        """Whether one gate stands for a row or a tensor, see `_pooled.py`."""
        return self.gated and self.granularity != "coordinate"


DEFAULTS: dict[str, Any] = {option.name: option.default for option in fields(GroupOptions)}


def check_published(given: dict[str, Any]) -> None:
    """Warn of options of the published rule outside it, and refuse any other name.

    Both with the raw mean are that rule, whoever spells it out.
    """
    for name in given:
        if name not in PUBLISHED:
            raise TypeError(f"PopRiskAdamW() got an unexpected keyword argument {name!r}")
    changed = [f"{name}={value!r}" for name, value in given.items() if value != DEFAULTS[name]]
    is_rule = given.keys() >= set(PUBLISHED) and given["noise_mean"] == "raw"
    if changed and not is_rule:
        warnings.warn(
            f"PopRiskAdamW({', '.join(changed)}) is deprecated and will be refused by the next "
            "release: gate_eps and noise_mean belong to PopRiskAdamW.paper(...).",
            DeprecationWarning,
            stacklevel=3,
        )


def needs_device_step(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether the parameter's step counts live on its device."""
    return group["capturable"] or param.device.type != "cpu"


def kept_moments(group: dict[str, Any]) -> tuple[str, ...]:
    """The moments that a group's parameters have states for."""
    return MOMENTS[:2] if group["noise_source"] == READ_OFF else MOMENTS


def uses_pooling(group: dict[str, Any]) -> bool:
    """Whether the gates of a group are those of rows or tensors, and act at all."""
    gated = group["gate"] != "none" and group["gate_blend"] > 0.0
    return bool(gated and group["granularity"] != "coordinate")


def uses_pieces(group: dict[str, Any]) -> bool:
    """Whether a group's noise comes from pieces of the gradient, and is needed at all."""
    gated = group["gate"] != "none" and group["gate_blend"] > 0.0
    return bool(gated and group["noise_source"] in PIECES)


def resolve_group(group: dict[str, Any]) -> GroupOptions:
    """The options of a complete group, with numbers for `alpha` and `lambda_pop`."""
    chosen = {name: group[name] for name in DEFAULTS}
    alpha = resolve_alpha(
        group["alpha"],
        beta1=group["betas"][0],
        false_open_rate=group["false_open_rate"],
        # without a gate no rate is out of reach
        beta2=group["betas"][1] if _is_read_off(group) else None,
        batch_size=group["batch_size"],
        dataset_size=group["dataset_size"],
    )
    chosen["alpha"] = alpha
    if group["lambda_pop"] is None:
        chosen["lambda_pop"] = default_lambda_pop(group["gate"], alpha)
    if isinstance(group["lr"], Tensor):
        lr = group["lr"].reshape(())
        chosen["lr"] = float(lr) if lr.device.type == "cpu" else lr  # no device is waited for
    return GroupOptions(**chosen)


def _is_read_off(group: dict[str, Any]) -> bool:
    return bool(group["noise_source"] == READ_OFF and group["gate"] != "none")


def check_group(group: dict[str, Any]) -> None:
    """Refuse options that cannot mean what the user wants."""
    for option in fields(GroupOptions):
        rule, value = option.metadata, group[option.name]
        if rule and not rule["holds"](value):
            name = rule["name"] or option.name
            raise ValueError(f"Invalid {name}: {value!r}. Must be {rule['allowed']}.")
    if group.get("differentiable"):
        raise ValueError(
            "Invalid differentiable: True. Must be False: a step is not differentiated through."
        )
    if "adaptive" in group:
        raise ValueError(
            "Invalid groups: 'adaptive' is an option of SAM, whose 'rho' (a radius) stands in the "
            "same groups as PopRiskAdamW's (a decay). Rename SAM's rho, and use no 'adaptive'."
        )
    if group["foreach"] and group["fused"]:
        raise ValueError("Invalid foreach and fused: both True. At most one of them may be.")
    source, stored = group["noise_source"], group["state_dtype"]
    if source != "temporal" and group["noise_mean"] == "raw":
        raise ValueError(
            f"Invalid noise_source: {source!r}. Must be 'temporal' with noise_mean='raw', the "
            "published rule."
        )
    stored = stored.get("exp_dev_sq") if isinstance(stored, dict) else stored
    if source in PIECES and stored not in (None, "float32"):
        raise ValueError(
            f"Invalid state_dtype: {stored!r} for exp_dev_sq. Must be None or 'float32' with "
            f"noise_source={source!r}."
        )
    resolve_group(group)


def idle_options(group: dict[str, Any]) -> list[str]:
    """Options that were set and do nothing, because noise off the moments has no average."""
    if not _is_read_off(group):
        return []
    stored = group["state_dtype"]
    idle = [] if group["rho"] == DEFAULTS["rho"] else [f"rho={group['rho']}"]
    if isinstance(stored, dict) and "exp_dev_sq" in stored:
        idle.append("state_dtype of exp_dev_sq")
    return idle


_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)


def check_params(params: Sequence[Tensor]) -> None:
    """Refuse parameters of one group that cannot be trained together or at all."""
    for param in params:
        is_trainable = param.is_floating_point() or param.is_complex()
        if is_trainable and param.dtype not in _DTYPES:
            raise ValueError(_wrong_dtype(param))
    devices = sorted({str(param.device) for param in params})
    if len(devices) > 1:
        raise ValueError(f"Invalid parameter devices: {devices}. One group must be on one device.")


def check_gradients(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse sparse gradients, and parameters converted to float16 since they were checked.

    By RuntimeError, torch's type for both.
    """
    for group in groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.dtype not in _DTYPES:
                raise RuntimeError(_wrong_dtype(param))
            if param.grad.is_sparse:
                raise RuntimeError(
                    "PopRiskAdamW does not support sparse gradients: a row's noise cannot be "
                    "told from its absence. Use sparse=False for embeddings."
                )


def _wrong_dtype(param: Tensor) -> str:
    return (
        f"Invalid parameter dtype: {param.dtype}. Small updates round to nothing in it: use "
        "float32 parameters with autocast, or bfloat16."
    )
