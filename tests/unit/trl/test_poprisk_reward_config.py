"""Defaults, refusals and the command line; what is shared is tested with PopRiskDPOConfig."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl import RewardConfig, TrlParser

from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskRewardConfig

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def config(tmp_path: Path, **options: Any) -> PopRiskRewardConfig:
    return PopRiskRewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_defaults(tmp_path: Path) -> None:
    """Those of PopRiskDPOConfig, as far as a reward model has them, and TRL's."""
    ours = config(tmp_path)
    theirs = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    upstream = {field.name for field in fields(RewardConfig)}
    own = {f.name: f for f in fields(PopRiskRewardConfig) if f.name not in upstream}
    stop = {field.name for field in fields(PopRiskDPOConfig) if field.name.startswith("stop")}
    assert own.keys() == {"noise", "noise_rate", "pair_id_column"} | stop
    assert all(field.metadata["help"] for field in own.values())
    dpo = PopRiskDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert all(getattr(ours, name) == getattr(dpo, name) for name in (*own, "optim", "optim_args"))
    different = {name for name in upstream if getattr(ours, name) != getattr(theirs, name)}
    assert different == {"optim", "optim_args"}
    assert PopRiskRewardConfig(**{**ours.to_dict(), "pad_token": None}).stop_restore == "best"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "rdpo"}, r"Invalid noise: 'rdpo'. Must be one of \('off', 'auto'\)."),
        ({"noise_rate": 0.5}, r"Invalid noise_rate: 0.5. Must be in \[0, 0.5\)"),
        ({"noise": False, "noise_rate": 0.2}, "noise='off' makes no use of it"),
        ({"stop_kappa": 0.5}, "Invalid stop_kappa: 0.5"),
        ({"optim_args": "gates=hard"}, "gates"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_command_line(tmp_path: Path) -> None:
    options = "--noise off --no_stop --stop_window 12 --stop_restore none --optim adamw_torch"
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", *options.split()]
    (parsed,) = TrlParser(PopRiskRewardConfig).parse_args_and_config(common)
    assert (parsed.noise, parsed.stop, parsed.stop_window) == ("off", False, 12)
    assert (parsed.stop_restore, parsed.optim, parsed.optim_args) == (None, "adamw_torch", None)
