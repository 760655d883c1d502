"""Adapters of axolotl, ms-swift and LLaMA-Factory, driven as these frameworks would.

None of them is installed: stubs with their interfaces stand in (`tests.helpers.framework_stubs`).
"""

import doctest
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Trainer

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.optim import PopRiskAdamW
from tests.helpers import framework_stubs as stubs
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset

PLUGIN = "poprisk_integrations.huggingface.frameworks.axolotl.PopRiskPlugin"
ADAPTERS = {"axolotl": "axolotl", "swift4": "ms_swift", "swift3": "ms_swift"}
ADAPTERS["llama_factory"] = "llama_factory"
MISSING = {"axolotl": "axolotl", "ms_swift": "ms-swift", "llama_factory": "llamafactory"}


def optimizer_of(trainer: Trainer) -> Any:
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def stops(trainer: Trainer) -> list[PopRiskEarlyStoppingCallback]:
    callbacks = trainer.callback_handler.callbacks
    return [c for c in callbacks if isinstance(c, PopRiskEarlyStoppingCallback)]


class Framework:
    """Trains with one of them: `optim` by name, options of the stop where it takes them from."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.name, self._patch, self._out = name, monkeypatch, out
        self._adapters = stubs.adapter(ADAPTERS[name])
        self._module: Any = None
        base = stubs.OptimizerCallback
        content: dict[str, dict[str, Any]] = {
            "axolotl": {"axolotl.integrations.base": {"BasePlugin": stubs.BasePlugin}},
            "swift4": {
                "swift.optimizers": {
                    "OptimizerCallback": base,
                    "optimizers_map": {"default": base},
                },
                "swift.callbacks": {"callbacks_map": {}},
            },
            "swift3": {"swift.plugin": {"optimizers_map": {}, "extra_callbacks": []}},
            "llama_factory": {
                "llamafactory.hparams": {"read_args": self._read_args},
                "llamafactory.train.tuner": {"run_exp": self._run_exp},
            },
        }
        for module, names in content[name].items():
            stubs.install(monkeypatch, module, **names)

    @property
    def module(self) -> Any:
        """The adapter, imported when it is first asked for: it may read the environment."""
        self._module = self._module or next(self._adapters)
        return self._module

    def close(self) -> None:
        self._adapters.close()  # type: ignore[attr-defined]

    def train(self, optim: str, *extra: str, epochs: int = 1, **options: Any) -> Trainer:
        """`extra` are arguments of a command line."""
        ours = {f"poprisk_{key}": value for key, value in options.items() if "optim_" not in key}
        theirs = {key: value for key, value in options.items() if "optim_" in key}
        if self.name.startswith("swift"):
            for key, value in ours.items():
                self._patch.setenv(key.upper(), str(value))
            assert self.module is not None
            theirs |= {"num_train_epochs": epochs}
            known = optim if "poprisk" in optim else None  # else Trainer's own
            if self.name == "swift3":
                return stubs.swift3_train(self._out, known, **theirs)
            callbacks = ("poprisk_stop",) if options.get("stop", True) else ()
            return stubs.swift4_train(self._out, known, callbacks, **theirs)
        if self.name == "axolotl":
            config = {"plugins": [PLUGIN], "optimizer": optim, "num_epochs": epochs}
            return stubs.axolotl_train(yaml.safe_dump({**config, **theirs, **ours}), self._out)
        config = {"stage": "sft", "optim": optim, "num_train_epochs": epochs}
        path = self._out / "train.yaml"
        path.write_text(yaml.safe_dump({**config, **theirs, **ours}))
        self._patch.setattr(sys, "argv", ["-m", str(path), *extra])
        self.module.main()
        return self._trained

    def _read_args(self) -> Any:
        if not sys.argv[1].endswith(".yaml"):
            return sys.argv[1:]
        given = dict(item.split("=", 1) for item in sys.argv[2:])
        return {**yaml.safe_load(Path(sys.argv[1]).read_text()), **given}

    def _run_exp(self, args: Any = None, callbacks: Any = None) -> None:
        assert args.pop("stage") == "sft"
        self._trained = Trainer(
            model=TinyModel(),  # type: ignore[arg-type]
            args=arguments(self._out, **args),  # unknown keys are a TypeError
            train_dataset=dataset(),  # type: ignore[arg-type]
            callbacks=callbacks,
        )
        self._trained.train()


@pytest.fixture(params=ADAPTERS)
def framework(request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Framework]:
    pytest.importorskip("pydantic")
    found = Framework(request.param, monkeypatch, tmp_path)
    yield found
    found.close()


def test_optimizer_and_stop_arrive_with_their_options(framework: Framework, tmp_path: Path) -> None:
    options = {"stop_criterion": "signal", "stop_window": 8, "stop_kappa": 1.5}
    trainer = framework.train("poprisk_adamw", epochs=60, optim_args="gate=hard", **options)
    optimizer = optimizer_of(trainer)
    assert isinstance(optimizer, PopRiskAdamW)
    assert optimizer.param_groups[0]["gate"] == "hard"
    (stop,) = stops(trainer)
    assert (stop.kappa, stop.state()["args"]["window"]) == (1.5, 8)
    assert stop.stopping_state["stop_step"] == trainer.state.global_step < 60 * 8
    assert (tmp_path / "poprisk_stop.json").exists()


def test_without_the_stop_and_with_another_optimizer(framework: Framework) -> None:
    trainer = framework.train("adamw_torch", stop=False)
    assert type(optimizer_of(trainer)).__name__ == "AdamW"
    assert stops(trainer) == []


def test_mistakes_are_named(framework: Framework) -> None:
    with pytest.raises(ValueError, match=r"Invalid poprisk_stop_kappa: 0\.5"):
        framework.train("poprisk_adamw", stop_kappa=0.5)


@pytest.mark.parametrize("framework", ["swift4", "llama_factory"], indirect=True)
def test_examples(framework: Framework) -> None:
    assert doctest.testmod(framework.module) == (0, 1)


@pytest.mark.parametrize("name", MISSING)
def test_without_the_framework(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "poprisk_integrations.huggingface.frameworks.find_spec"
    monkeypatch.setattr(where, lambda module: None)
    pip_name = MISSING[name]
    with pytest.raises(ImportError, match=f"{pip_name} not found.*pip install {pip_name}"):
        next(stubs.adapter(name))


@pytest.mark.parametrize("framework", ["axolotl"], indirect=True)
def test_axolotl_takes_a_mapping(framework: Framework) -> None:
    trainer = framework.train("poprisk_adamw", optim_args={"gate": "hard"})
    assert optimizer_of(trainer).param_groups[0]["gate"] == "hard"


@pytest.mark.parametrize("framework", ["swift4"], indirect=True)
def test_swift4_alone(framework: Framework, tmp_path: Path) -> None:
    """alpha=finite needs what only Trainer knows: the number of examples."""
    finite = framework.train("poprisk_adamw", optim_args="alpha=finite", stop=False)
    assert optimizer_of(finite).param_groups[0]["dataset_size"] == len(dataset())
    paper = framework.train("poprisk_adamw_paper", stop=False)
    assert optimizer_of(paper).param_groups[0]["noise_mean"] == "raw"
    with pytest.raises(ValueError, match="Leave poprisk_stop out of --callbacks"):
        stubs.swift4_train(tmp_path, None, ("poprisk_stop",))
    args = arguments(tmp_path, optim="adamw_torch")
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    config = type("HfConfig", (), {"config": offload})()
    args.deepspeed_plugin = type("Plugin", (), {"hf_ds_config": config})()
    with pytest.raises(ValueError, match="DeepSpeedCPUAdam would replace PopRiskAdamW"):
        sys.modules["swift.optimizers"].optimizers_map["poprisk_adamw"](args, None)


@pytest.mark.parametrize("framework", ["llama_factory"], indirect=True)
def test_llama_factory_takes_options_after_the_file_only(
    framework: Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stop,) = stops(framework.train("adamw_torch", "poprisk_stop_kappa=1.5"))
    assert stop.kappa == 1.5
    with pytest.raises(ValueError, match="Did you mean 'poprisk_stop_kappa'"):
        framework.train("adamw_torch", stop_kapa=3)
    for argv, error, said in (
        ([], SystemExit, "a configuration is missing"),
        (["--poprisk_stop_kappa", "3"], ValueError, "'--poprisk_stop_kappa': give it as a key"),
    ):
        monkeypatch.setattr(sys, "argv", ["-m", *argv])
        with pytest.raises(error, match=said):
            framework.module.main()
