"""Names, signatures and metadata that users rely on."""

import inspect
from importlib.metadata import entry_points, version

import poprisk_integrations
from poprisk_integrations import PopRiskAdamW

CONTRACT = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "gate": "soft",
    "alpha": "calibrated",
    "false_open_rate": 0.3173,
    "lambda_pop": None,
    "rho": 0.99,
    "gate_warmup": 0,
    "gate_blend": 1.0,
    "preserve_norm": False,
    "batch_size": None,
    "dataset_size": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "state_dtype": None,
}


def test_constructor():
    parameters = inspect.signature(PopRiskAdamW).parameters
    assert {name: parameters[name].default for name in CONTRACT} == CONTRACT
    assert list(parameters)[:5] == ["params", "lr", "betas", "eps", "weight_decay"]
    keyword_only = [p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[5:]]
    assert all(keyword_only)


def test_top_level():
    assert set(poprisk_integrations.__all__) == {"PopRiskAdamW", "__version__"}
    assert version("poprisk_integrations") == poprisk_integrations.__version__


def test_console_script():
    (script,) = (e for e in entry_points(group="console_scripts") if e.name == "poprisk")
    assert script.value == "poprisk_integrations.cli.main:main"


def test_adapters_export_the_contracted_names():
    import poprisk_integrations.huggingface as huggingface
    import poprisk_integrations.lightning as lightning
    import poprisk_integrations.trl as trl

    assert set(huggingface.__all__) >= {
        "PopRiskEarlyStoppingCallback",
        "PopRiskMonitorCallback",
        "PopRiskTrainerMixin",
        "optimizer_cls_and_kwargs",
        "register",
    }
    assert set(lightning.__all__) >= {"PopRiskEarlyStopping", "PopRiskMonitor", "PopRiskOptimizer"}
    assert set(trl.__all__) >= {"PopRiskDPOConfig", "PopRiskDPOTrainer"}
