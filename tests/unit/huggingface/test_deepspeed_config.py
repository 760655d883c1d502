import pytest

from poprisk_integrations.huggingface.deepspeed_config import check_deepspeed_config

OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ALLOWED = {"zero_force_ds_cpu_optimizer": False}
SUPER = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}}
ZENFLOW = {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}
SECTION = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": None, "zenflow": None}},
        {**OFFLOAD, **ALLOWED},
    ],
)
def test_our_optimizer_would_run(config):
    check_deepspeed_config(config)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (SECTION, '"zero_allow_untested_optimizer": true'),
        (OFFLOAD, '"zero_force_ds_cpu_optimizer": false'),
        ({**OFFLOAD, "zero_force_ds_cpu_optimizer": True}, '"zero_force_ds_cpu_optimizer": false'),
        ({**SUPER, **ALLOWED}, '"super_offload": false'),
        (ZENFLOW, '"zenflow": null'),
        (
            {"zero_optimization": {**OFFLOAD["zero_optimization"], "zenflow": {}}, **ALLOWED},
            '"zenflow": null',
        ),
    ],
)
def test_a_silent_replacement_raises_with_the_json_line(config, line):
    with pytest.raises(ValueError, match="would replace PopRiskAdamW") as caught:
        check_deepspeed_config(config)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
