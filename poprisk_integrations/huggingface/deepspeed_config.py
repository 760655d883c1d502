"""DeepSpeed settings under which another optimizer would run than the one asked for."""

from collections.abc import Mapping
from typing import Any

__all__ = ["check_deepspeed_config"]


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed config that replaces the optimizer without a word.

    An "optimizer" section makes DeepSpeed build its own, and Trainer's is never created. With an
    offloaded optimizer, accelerate puts DeepSpeedCPUAdam in the place of any other optimizer
    unless "zero_force_ds_cpu_optimizer" is false. Two more are built on Adams of DeepSpeed's:
    "super_offload" steps a DeepSpeedCPUAdam in another process, "zenflow" an AdamW for the columns
    with the largest gradients. DeepSpeed 0.19 fails there with errors that do not say why
    (KeyError 'amsgrad', a TypeError about None), except for "zenflow" at stage 3, which goes ahead.

    Args:
        config: The DeepSpeed config as a dictionary. An offload device "auto" is for the launcher
            to fill in, and passes until then.

    Raises:
        ValueError: Naming the line to change.

    Example:
        >>> check_deepspeed_config({"zero_optimization": {"stage": 2}})
    """
    if "optimizer" in config:
        raise ValueError(
            'Invalid DeepSpeed config: its "optimizer" section would replace PopRiskAdamW. '
            'Delete that section and add the line "zero_allow_untested_optimizer": true'
        )
    zero = config.get("zero_optimization") or {}
    if zero.get("zenflow") is not None:
        raise ValueError(
            "Invalid DeepSpeed config: with zenflow, an AdamW of DeepSpeed's would replace "
            "PopRiskAdamW for the columns with the largest gradients. Set the line "
            '"zenflow": null in "zero_optimization"'
        )
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") in ("none", "auto"):
        return
    if config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            "Invalid DeepSpeed config: with offload_optimizer, DeepSpeedCPUAdam would replace "
            'PopRiskAdamW. Add the line "zero_force_ds_cpu_optimizer": false'
        )
    if offload.get("super_offload"):
        raise ValueError(
            "Invalid DeepSpeed config: with super_offload, DeepSpeedCPUAdam would replace "
            'PopRiskAdamW. Set the line "super_offload": false in "offload_optimizer"'
        )
