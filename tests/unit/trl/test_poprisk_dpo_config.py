"""Defaults, what is accepted, and the ways to write a config; refusals are among the goldens."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from transformers.training_args import OptimizerNames
from trl import DPOConfig, TrlParser

from poprisk_integrations.trl import PopRiskDPOConfig

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

OWN = {
    "noise": "auto", "noise_rate": None, "pair_id_column": None, "pair_weight_column": None,
    "rdpo_max_margin": 4.0, "holder_gamma": 2.0, "on_policy_kl_samples": 0, "stop": True,
    "auto_learning_rate": False,
    "stop_criterion": "auto", "stop_sit_out": 0.15, "stop_patience": 10, "stop_kappa": 1.0,
    "stop_window": "auto", "stop_threshold": 1.0, "stop_min_steps": 0, "stop_action": None,
    "stop_restore": "best",
}  # fmt: skip


def config(tmp_path: Path, **options: Any) -> PopRiskDPOConfig:
    return PopRiskDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_defaults(tmp_path: Path) -> None:
    ours = config(tmp_path)
    theirs = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    upstream = {field.name for field in fields(DPOConfig)}
    own = {field.name: field for field in fields(PopRiskDPOConfig) if field.name not in upstream}
    assert {name: getattr(ours, name) for name in own} == OWN
    assert all(field.metadata["help"] for field in own.values())
    different = {name for name in upstream if getattr(ours, name) != getattr(theirs, name)}
    assert different == {"optim", "optim_args"}
    assert ours.optim == "poprisk_adamw"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "false_open_rate=0.05"),
        ({"optim_args": "gate=hard"}, "gate=hard,false_open_rate=0.05"),
        ({"optim_args": "alpha=fresh"}, "alpha=fresh"),
        ({"optim_args": "false_open_rate=0.3"}, "false_open_rate=0.3"),
        ({"optim": "poprisk_adamw_paper"}, None),
        ({"optim": "adamw_torch"}, None),
        ({"optim": "adafactor"}, None),
    ],
)
def test_the_boundary_is_the_one_measured_on_preferences(
    tmp_path: Path, options: dict[str, Any], expected: str | None
) -> None:
    args = config(tmp_path, **options)
    assert args.optim == OptimizerNames(options.get("optim", "poprisk_adamw"))
    assert args.optim_args == expected
    args.__post_init__()  # as copies do
    assert args.optim_args == expected
    with pytest.raises(ValueError, match="poprisk_sgd"):
        config(tmp_path, optim="poprisk_sgd")


@pytest.mark.parametrize("noise", ["off", "cdpo", "rdpo", "holder", "weights", "auto", False])
def test_noise_modes(tmp_path: Path, noise: Any) -> None:
    ours = config(tmp_path, noise=noise)
    mode = noise or "off"  # how YAML reads a bare `off`
    assert (ours.noise, ours.pair_loss.mode) == (mode, mode)
    assert ours.loss_is_replaced == (mode not in ("off", "auto"))
    assert (ours.pair_loss.max_margin, ours.pair_loss.gamma) == (4, 2)


def test_combinations_that_are_accepted(tmp_path: Path) -> None:
    assert config(tmp_path, pair_weight_column="w").loss_is_replaced
    assert config(tmp_path, noise="rdpo", loss_type=["sft", "sigmoid"]).loss_is_replaced
    assert config(tmp_path, noise="rdpo", rdpo_max_margin=None).pair_loss.max_margin is None
    for loss in ("robust", "exo_pair", "aot", "aot_unpaired", ["sigmoid", "robust"]):
        assert config(tmp_path, loss_type=loss, label_smoothing=0.1).label_smoothing == 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ipo"},
        {"loss_type": ["hinge", "sft"]},
        {"f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
    ],
)
def test_the_default_gets_in_nobody_s_way(tmp_path: Path, options: dict[str, Any]) -> None:
    for noise in ("auto", "off"):
        args = config(tmp_path, noise=noise, **options)
        assert not args.loss_is_replaced
        assert args.pair_values_refusal.startswith(f"with {next(iter(options))}=")


def test_label_smoothing_that_trl_accepts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config(tmp_path, loss_type="hinge", label_smoothing=0.1, noise="off")
    assert "TRL >= 0.29 ignores it with loss_type=['hinge']" in caplog.text


def test_sampling_needs_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"on_policy_kl_samples: 4. Sampling needs the whole"):
        config(tmp_path, on_policy_kl_samples=4)


def test_rebuilding_from_a_dict_and_replace(tmp_path: Path) -> None:
    ours = config(tmp_path, stop_window=12, stop_restore="none")
    assert ours.stop_restore is None
    # TRL's to_dict masks pad_token like a secret.
    assert PopRiskDPOConfig(**{**ours.to_dict(), "pad_token": None}).stop_window == 12
    assert replace(ours, stop_kappa=3.0).stop_kappa == 3.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--stop_window auto", {"stop_window": "auto"}),
        ("--stop_window 12", {"stop_window": 12}),
        ("--no_stop", {"stop": False}),
        ("--stop false", {"stop": False}),
        ("--stop_criterion risk --stop_sit_out 0.1", {"stop_sit_out": 0.1}),
        ("--stop_restore none --stop_kappa 3", {"stop_restore": None, "stop_kappa": 3}),
        ("--optim adamw_torch", {"optim": "adamw_torch"}),
        ("--noise rdpo --noise_rate 0.2", {"noise": "rdpo", "noise_rate": 0.2}),
    ],
)
def test_command_line(tmp_path: Path, arguments: str, expected: dict[str, Any]) -> None:
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (parsed,) = TrlParser(PopRiskDPOConfig).parse_args_and_config(common + arguments.split())
    assert {name: getattr(parsed, name) for name in expected} == expected


def test_options_of_the_stop(tmp_path: Path) -> None:
    options = {
        "kappa": 3.0, "window": 11, "threshold": 0.9, "min_steps": 7, "action": "cooldown",
        "restore": None, "criterion": "risk", "sit_out": 0.2, "patience": 4,
    }  # fmt: skip
    ours = config(tmp_path, **{f"stop_{name}": value for name, value in options.items()})
    found = ours.stop_options.arguments()
    assert {name: found[name] for name in options} == options
