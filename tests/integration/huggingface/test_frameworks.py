"""Adapters of axolotl, ms-swift and LLaMA-Factory, driven as these frameworks would.

None of them is installed: stubs with their interfaces stand in (`tests.helpers.framework_stubs`).
"""

import doctest
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import Trainer

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.optim import PopRiskAdamW
from tests.helpers import framework_stubs as stubs
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset

PLUGIN = "poprisk_integrations.huggingface.frameworks.axolotl.PopRiskPlugin"
MISSING = {"axolotl": "axolotl", "ms_swift": "ms-swift", "llama_factory": "llamafactory"}


def optimizer_of(trainer: Trainer) -> Any:
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def stops(trainer: Trainer) -> list[PopRiskEarlyStoppingCallback]:
    callbacks = trainer.callback_handler.callbacks
    return [c for c in callbacks if isinstance(c, PopRiskEarlyStoppingCallback)]


@pytest.mark.parametrize("name", MISSING)
def test_without_the_framework(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "poprisk_integrations.huggingface.frameworks._requirement.find_spec"
    monkeypatch.setattr(where, lambda module: None)
    with pytest.raises(
        ImportError, match=f"{MISSING[name]} not found.*pip install {MISSING[name]}"
    ):
        next(stubs.adapter(name))


# axolotl


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("pydantic")
    stubs.install(monkeypatch, "axolotl.integrations.base", BasePlugin=stubs.BasePlugin)
    yield from stubs.adapter("axolotl")


def test_axolotl(axolotl: ModuleType, tmp_path: Path) -> None:
    text = f"""
    plugins: [{PLUGIN}]
    optimizer: poprisk_adamw
    optim_args: {{gate: hard}}
    num_epochs: 60
    poprisk_stop_window: 8
    poprisk_stop_kappa: 1.5
    """
    trainer = stubs.axolotl_train(text, tmp_path)
    optimizer = optimizer_of(trainer)
    assert isinstance(optimizer, PopRiskAdamW)
    assert optimizer.param_groups[0]["gate"] == "hard"
    (stop,) = stops(trainer)
    assert (stop.kappa, stop.state()["args"]["window"]) == (1.5, 8)
    assert stop.stopping_state["stop_step"] == trainer.state.global_step < 60 * 8
    assert (tmp_path / "poprisk_stop.json").exists()


def test_axolotl_without_the_stop(axolotl: ModuleType, tmp_path: Path) -> None:
    text = f"plugins: [{PLUGIN}]\noptimizer: adamw_torch\npoprisk_stop: false"
    trainer = stubs.axolotl_train(text, tmp_path)
    assert not isinstance(optimizer_of(trainer), PopRiskAdamW)
    assert stops(trainer) == []


def test_axolotl_mistakes(axolotl: ModuleType, tmp_path: Path) -> None:
    text = f"plugins: [{PLUGIN}]\noptimizer: poprisk_adamw\npoprisk_stop_kappa: 0.5"
    with pytest.raises(ValueError, match=r"Invalid poprisk_stop_kappa: 0\.5"):
        stubs.axolotl_train(text, tmp_path)


def test_axolotl_knows_every_option(axolotl: ModuleType) -> None:
    """A key that the model of the configuration lacks would vanish without a word."""
    from poprisk_integrations.huggingface.frameworks.stop_options import STOP_OPTIONS

    assert set(axolotl.PopRiskArgs.model_fields) == set(STOP_OPTIONS)


# ms-swift


@pytest.fixture
def swift4(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    optimizers = {"default": stubs.OptimizerCallback}
    stubs.install(
        monkeypatch,
        "swift.optimizers",
        OptimizerCallback=stubs.OptimizerCallback,
        optimizers_map=optimizers,
    )
    stubs.install(monkeypatch, "swift.callbacks", callbacks_map={})
    yield from stubs.adapter("ms_swift")


@pytest.fixture
def swift3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports the adapter when called: it reads the environment at its import."""
    stubs.install(monkeypatch, "swift.plugin", optimizers_map={}, extra_callbacks=[])
    adapters = stubs.adapter("ms_swift")
    yield lambda: next(adapters)
    adapters.close()  # type: ignore[attr-defined]


def test_swift4(swift4: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPRISK_STOP_WINDOW", "8")
    trainer = stubs.swift4_train(
        tmp_path, "poprisk_adamw", ("poprisk_stop",), optim_args="gate=hard", num_train_epochs=60
    )
    optimizer = optimizer_of(trainer)
    assert isinstance(optimizer, PopRiskAdamW)
    assert optimizer.param_groups[0]["gate"] == "hard"
    (stop,) = stops(trainer)
    assert stop.stopping_state["stop_step"] == trainer.state.global_step < 60 * 8


def test_swift4_examples(swift4: ModuleType) -> None:
    assert doctest.testmod(swift4) == (0, 1)


def test_swift4_other_names(swift4: ModuleType, tmp_path: Path) -> None:
    """alpha=finite needs what only Trainer knows: the number of examples."""
    finite = stubs.swift4_train(tmp_path, "poprisk_adamw", optim_args="alpha=finite")
    assert optimizer_of(finite).param_groups[0]["dataset_size"] == len(dataset())
    paper = stubs.swift4_train(tmp_path, "poprisk_adamw_paper")
    assert optimizer_of(paper).param_groups[0]["noise_mean"] == "raw"
    plain = stubs.swift4_train(tmp_path)
    assert type(optimizer_of(plain)).__name__ == "AdamW"
    assert stops(finite) == stops(paper) == stops(plain) == []


def test_swift4_mistakes(
    swift4: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPRISK_STOP", "false")
    with pytest.raises(ValueError, match="Leave poprisk_stop out of --callbacks"):
        stubs.swift4_train(tmp_path, None, ("poprisk_stop",))
    args = arguments(tmp_path, optim="adamw_torch")
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    config = type("HfConfig", (), {"config": offload})()
    args.deepspeed_plugin = type("Plugin", (), {"hf_ds_config": config})()
    with pytest.raises(ValueError, match="DeepSpeedCPUAdam would replace PopRiskAdamW"):
        sys.modules["swift.optimizers"].optimizers_map["poprisk_adamw"](args, None)


def test_swift3(swift3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPRISK_STOP_WINDOW", "8")
    swift3()
    trainer = stubs.swift3_train(tmp_path, "poprisk_adamw", num_train_epochs=60)
    assert isinstance(optimizer_of(trainer), PopRiskAdamW)
    (stop,) = stops(trainer)
    assert stop.stopping_state["stop_step"] == trainer.state.global_step < 60 * 8


def test_swift3_without_the_stop(
    swift3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPRISK_STOP", "false")
    swift3()
    trainer = stubs.swift3_train(tmp_path)
    assert type(optimizer_of(trainer)).__name__ == "AdamW"
    assert stops(trainer) == []


# LLaMA-Factory


@pytest.fixture
def llama_factory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`run(yaml, *arguments)` is the adapter's command line; it returns the trainer."""
    trained: list[Trainer] = []

    def read_args(args: Any = None) -> Any:
        if not sys.argv[1].endswith(".yaml"):
            return sys.argv[1:]
        given = dict(item.split("=", 1) for item in sys.argv[2:])
        return {**yaml.safe_load(Path(sys.argv[1]).read_text()), **given}

    def run_exp(args: Any = None, callbacks: Any = None) -> None:
        assert args.pop("stage") == "sft"
        trainer = Trainer(
            model=TinyModel(),  # type: ignore[arg-type]
            args=arguments(tmp_path, **args),  # unknown keys are a TypeError
            train_dataset=dataset(),  # type: ignore[arg-type]
            callbacks=callbacks,
        )
        trainer.train()
        trained.append(trainer)

    stubs.install(monkeypatch, "llamafactory.hparams", read_args=read_args)
    stubs.install(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    for module in stubs.adapter("llama_factory"):

        def run(text: str, *extra: str, module: ModuleType = module) -> Trainer:
            (tmp_path / "train.yaml").write_text(text)
            monkeypatch.setattr(sys, "argv", ["-m", str(tmp_path / "train.yaml"), *extra])
            module.main()
            return trained.pop()

        run.module = module  # type: ignore[attr-defined]
        yield run


def test_llama_factory(llama_factory: Any) -> None:
    text = "stage: sft\noptim: poprisk_adamw\nnum_train_epochs: 60\npoprisk_stop_window: 8"
    trainer = llama_factory(text, "poprisk_stop_kappa=1.5")
    assert isinstance(optimizer_of(trainer), PopRiskAdamW)
    (stop,) = stops(trainer)
    assert (stop.kappa, stop.state()["args"]["window"]) == (1.5, 8)
    assert stop.stopping_state["stop_step"] == trainer.state.global_step < 60 * 8


def test_llama_factory_examples(llama_factory: Any) -> None:
    assert doctest.testmod(llama_factory.module) == (0, 1)


def test_llama_factory_without_the_stop(llama_factory: Any) -> None:
    trainer = llama_factory("stage: sft\noptim: adamw_torch\npoprisk_stop: false")
    assert stops(trainer) == []


def test_llama_factory_mistakes(llama_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Did you mean 'poprisk_stop_kappa'"):
        llama_factory("stage: sft\npoprisk_stop_kapa: 3")
    monkeypatch.setattr(sys, "argv", ["-m"])
    with pytest.raises(SystemExit, match="a configuration is missing"):
        llama_factory.module.main()
    monkeypatch.setattr(sys, "argv", ["-m", "--stage", "sft", "--poprisk_stop_kappa", "3"])
    with pytest.raises(ValueError, match="'--poprisk_stop_kappa': give it as a key"):
        llama_factory.module.main()
