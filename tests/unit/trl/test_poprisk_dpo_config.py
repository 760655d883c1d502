"""Defaults, what is refused and with which words, and the ways to write a config."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from transformers.training_args import OptimizerNames
from trl import DPOConfig, TrlParser

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.trl import PopRiskDPOConfig
from poprisk_integrations.trl.early_stopping import auto_window, stopping_callback

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def config(tmp_path: Path, **options: Any) -> PopRiskDPOConfig:
    return PopRiskDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_defaults(tmp_path: Path) -> None:
    ours = config(tmp_path)
    assert ours.optim == "poprisk_adamw"
    assert (ours.noise, ours.noise_rate) == ("auto", None)
    assert (ours.stop, ours.stop_window, ours.stop_kappa) == (True, "auto", 1.0)
    theirs = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    different = {
        f.name for f in fields(DPOConfig) if getattr(ours, f.name) != getattr(theirs, f.name)
    }
    assert different == {"optim", "optim_args"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "false_open_rate=0.05"),
        ({"optim_args": "gate=hard"}, "gate=hard,false_open_rate=0.05"),
        ({"optim_args": "alpha=fresh"}, "alpha=fresh"),
        ({"optim_args": "false_open_rate=0.3"}, "false_open_rate=0.3"),
        ({"optim": "poprisk_adamw_paper"}, None),
        ({"optim": "adamw_torch"}, None),
    ],
)
def test_the_boundary_is_the_one_measured_on_preferences(
    tmp_path: Path, options: dict[str, Any], expected: str | None
) -> None:
    args = config(tmp_path, **options)
    assert args.optim_args == expected
    args.__post_init__()  # as copies do
    assert args.optim_args == expected


def test_every_own_field_has_a_help_text() -> None:
    own = {f.name: f for f in fields(PopRiskDPOConfig)}.keys() - {f.name for f in fields(DPOConfig)}
    assert own == {
        "noise", "noise_rate", "pair_id_column", "pair_weight_column", "rdpo_max_margin",
        "holder_gamma", "on_policy_kl_samples", "stop", "stop_kappa",
        "stop_window", "stop_threshold", "stop_min_steps", "stop_action", "stop_restore",
    }  # fmt: skip
    for field in fields(PopRiskDPOConfig):
        assert field.metadata.get("help") or field.name not in {*own, "optim"}, field.name


@pytest.mark.parametrize("noise", ["off", "cdpo", "rdpo", "holder", "weights", "auto"])
def test_noise_modes(tmp_path: Path, noise: str) -> None:
    ours = config(tmp_path, noise=noise)
    assert ours.loss_is_replaced == (noise not in ("off", "auto"))
    assert config(tmp_path, pair_weight_column="w").loss_is_replaced
    assert (ours.pair_loss.mode, ours.pair_loss.max_margin, ours.pair_loss.gamma) == (noise, 4, 2)


def test_unknown_mode_and_bare_off_of_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"noise: 'none'. Must be one of \('off', 'cdpo'"):
        config(tmp_path, noise="none")
    assert config(tmp_path, noise=False).noise == "off"


@pytest.mark.parametrize("rate", [-0.01, 0.5, 1.0, float("nan")])
def test_noise_rate_out_of_range(tmp_path: Path, rate: float) -> None:
    with pytest.raises(ValueError, match=r"Invalid noise_rate: .*Must be in \[0, 0.5\)"):
        config(tmp_path, noise_rate=rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "off", "noise_rate": 0.3}, "noise_rate: 0.3. noise='off' makes no use"),
        ({"noise": "holder", "noise_rate": 0.3}, "noise_rate: 0.3. noise='holder' makes no use"),
        ({"noise": "off", "pair_weight_column": "w"}, "pair_weight_column: 'w'. noise='off'"),
        ({"rdpo_max_margin": 0.0}, "rdpo_max_margin: 0.0"),
        ({"rdpo_max_margin": float("inf")}, "rdpo_max_margin: inf"),
        ({"holder_gamma": -1.0}, "holder_gamma: -1.0"),
        ({"on_policy_kl_samples": -1}, "on_policy_kl_samples: -1"),
        ({"noise": "rdpo", "rdpo_max_margin": None, "stop": False}, "nothing bounds the loss"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_the_published_rdpo_is_to_be_had_with_the_stop(tmp_path: Path) -> None:
    assert config(tmp_path, noise="rdpo", rdpo_max_margin=None).pair_loss.max_margin is None


OTHER_LOSSES = [
    ({"loss_type": "ipo"}, r"loss_type: \['ipo'\]. noise='rdpo' stands in for the loss 'sigmoid'"),
    ({"loss_type": ["hinge", "sft"]}, "loss_type: "),
    ({"loss_type": ["sigmoid", "sigmoid"]}, "each may occur once"),
    ({"f_divergence_type": "js_divergence"}, "f_divergence_type: 'js_divergence'"),
    ({"ld_alpha": 0.5}, "ld_alpha: 0.5"),
    ({"use_weighting": True}, "use_weighting: True"),
]


@pytest.mark.parametrize(("options", "message"), OTHER_LOSSES)
def test_losses_without_a_form_for_wrong_labels(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, noise="rdpo", **options)
    with pytest.raises(ValueError, match=r"pair_weight_column='w'|loss_type|which pair_weight"):
        config(tmp_path, pair_weight_column="w", **options)
    # The default gets in nobody's way.
    assert not config(tmp_path, **options).loss_is_replaced
    assert not config(tmp_path, noise="off", **options).loss_is_replaced


def test_sigmoid_among_other_terms(tmp_path: Path) -> None:
    assert config(tmp_path, noise="rdpo", loss_type=["sft", "sigmoid"]).loss_is_replaced


def test_sampling_needs_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"on_policy_kl_samples: 4. Sampling needs the whole"):
        config(tmp_path, on_policy_kl_samples=4)


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid"], ["sigmoid", "sft"], "ipo", "hinge"])
def test_label_smoothing_without_effect_is_refused(tmp_path: Path, loss_type: Any) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: 0.1. TRL .* noise_rate=0.1 with"):
        config(tmp_path, loss_type=loss_type, label_smoothing=0.1)


def test_label_smoothing_that_trl_accepts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config(tmp_path, loss_type="hinge", label_smoothing=0.1, noise="off")
    assert "TRL >= 0.29 ignores it with loss_type=['hinge']" in caplog.text
    with pytest.raises(ValueError, match=r"label_smoothing: 0.1"):
        config(tmp_path, loss_type="sigmoid", label_smoothing=0.1, noise="off")


@pytest.mark.parametrize(
    "loss_type", ["robust", "exo_pair", "aot", "aot_unpaired", ["sigmoid", "robust"]]
)
def test_label_smoothing_with_effect_is_kept(tmp_path: Path, loss_type: Any) -> None:
    assert config(tmp_path, loss_type=loss_type, label_smoothing=0.1).label_smoothing == 0.1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"stop_kappa": 0.5}, "stop_kappa: 0.5"),
        ({"stop_threshold": 0.0}, "stop_threshold: 0.0"),
        ({"stop_window": 1}, "stop_window: 1"),
        ({"stop_window": "epoch"}, "stop_window: 'epoch'"),
        ({"stop_min_steps": -1}, "stop_min_steps: -1"),
        ({"stop_action": "halt"}, "stop_action: 'halt'"),
        ({"stop_restore": "best"}, "stop_restore: 'best'"),
        ({"optim_args": "gait=soft"}, "gait"),
        ({"optim": "poprisk_sgd"}, "poprisk_sgd"),
    ],
)
def test_values_out_of_range(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **option)


def test_any_other_optimizer_is_honoured(tmp_path: Path) -> None:
    assert config(tmp_path, optim="adafactor").optim == OptimizerNames.ADAFACTOR


def test_rebuilding_from_a_dict_and_replace(tmp_path: Path) -> None:
    ours = config(tmp_path, stop_window=12, stop_restore="none")
    assert ours.stop_restore is None
    # TRL's to_dict masks pad_token like a secret.
    assert PopRiskDPOConfig(**{**ours.to_dict(), "pad_token": None}).stop_window == 12
    assert replace(ours, stop_kappa=3.0).stop_kappa == 3.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stop_window", "auto"], {"stop_window": "auto"}),
        (["--stop_window", "12"], {"stop_window": 12}),
        (["--no_stop"], {"stop": False}),
        (["--stop", "false"], {"stop": False}),
        (["--stop_restore", "none", "--stop_kappa", "3"], {"stop_restore": None, "stop_kappa": 3}),
        (["--optim", "adamw_torch"], {"optim": "adamw_torch"}),
        (["--noise", "rdpo", "--noise_rate", "0.2"], {"noise": "rdpo", "noise_rate": 0.2}),
    ],
)
def test_command_line(tmp_path: Path, arguments: list[str], expected: dict[str, Any]) -> None:
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (parsed,) = TrlParser(PopRiskDPOConfig).parse_args_and_config(common + arguments)
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("num_pairs", "window"),
    # Optimizer steps per epoch: 1, 24, 27, 250; batches of 4 on 2 processes, accumulated twice.
    [(16, 8), (384, 8), (420, 9), (4000, 83)],
)
def test_auto_window_is_a_third_of_an_epoch(num_pairs: int, window: int) -> None:
    assert auto_window(num_pairs, per_device=4, accumulation=2, world_size=2) == window


def test_options_reach_the_callback(tmp_path: Path) -> None:
    options = {
        "kappa": 3.0, "window": 11, "threshold": 0.9, "min_steps": 7, "action": "monitor",
        "restore": None,
    }  # fmt: skip
    ours = config(tmp_path, **{f"stop_{name}": value for name, value in options.items()})
    callback = stopping_callback(ours)
    assert isinstance(callback, PopRiskEarlyStoppingCallback)
    assert callback.state()["args"] == {**options, "accumulator": "auto", "epoch_steps": None}
