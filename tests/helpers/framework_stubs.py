"""What the adapters need of axolotl, ms-swift and LLaMA-Factory: their interfaces and no more.

Names, signatures and the order of calls are those of axolotl 0.19.0, ms-swift 4.6.0 and 3.12.6, and
LLaMA-Factory 0.9.5, read from their sources. Each stub ends in a run of the tiny Trainer.
"""

import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import Trainer

from tests.helpers.tiny_trainer import TinyModel, arguments, dataset

__all__ = ["adapter", "axolotl_train", "install", "swift3_train", "swift4_train"]

ADAPTERS = "poprisk_integrations.huggingface.frameworks"


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Put a module of this content, and its parents, where `import` finds them."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__spec__ = ModuleSpec(path, None, is_package=True)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
    for key, value in content.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def adapter(name: str) -> Iterator[ModuleType]:
    """The adapter of this name, imported afresh, and forgotten afterwards."""
    path = f"{ADAPTERS}.{name}"
    sys.modules.pop(path, None)
    try:
        yield importlib.import_module(path)
    finally:
        sys.modules.pop(path, None)


# axolotl


class DictDefault(dict[str, Any]):
    """axolotl's configuration: a key that is not there reads as None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class BasePlugin:
    """The hooks of axolotl's plugins that a run calls here."""

    def __init__(self) -> None: ...

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def pre_model_load(self, cfg: DictDefault) -> None: ...

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None: ...

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: Any) -> list[Any]:
        return []

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[Any]:
        return []

    def post_train(self, cfg: DictDefault, model: Any) -> None: ...


def axolotl_train(text: str, out: Path) -> Trainer:
    """`axolotl train`: from YAML over plugins and validation to training."""
    from pydantic import BaseModel

    class AxolotlInputConfigBase(BaseModel):
        plugins: list[str] | None = None
        optimizer: str | None = "adamw_torch_fused"
        optim_args: str | dict[str, Any] | None = None
        num_epochs: float = 1.0

    raw = DictDefault(yaml.safe_load(text))
    plugins = []
    for name in raw["plugins"]:
        module, _, cls = name.rpartition(".")
        plugins.append(getattr(importlib.import_module(module), cls)())
    for plugin in plugins:
        plugin.register(raw)

    added = [path for path in (plugin.get_input_args() for plugin in plugins) if path]
    namespace: dict[str, Any] = {"AxolotlInputConfigBase": AxolotlInputConfigBase}
    names = []
    for path in added:
        module, _, cls = path.rpartition(".")
        exec(f"from {module} import {cls}", namespace)  # as axolotl does
        names.append(cls)
    config = type("AxolotlInputConfig", (AxolotlInputConfigBase, *map(namespace.get, names)), {})
    cfg = DictDefault(config(**raw).model_dump(exclude_none=True))

    options: dict[str, Any] = {"optim": cfg.optimizer, "num_train_epochs": cfg.num_epochs}
    if isinstance(cfg.optim_args, dict):
        options["optim_args"] = ",".join(f"{k}={v}" for k, v in cfg.optim_args.items())
    elif cfg.optim_args:
        options["optim_args"] = cfg.optim_args
    model: Any = TinyModel()
    callbacks = [c for p in plugins for c in p.add_callbacks_pre_trainer(cfg=cfg, model=model)]
    trainer = Trainer(
        model=model,
        args=arguments(out, **options),
        train_dataset=dataset(),  # type: ignore[arg-type]
        callbacks=callbacks,
    )
    for plugin in plugins:
        plugin.post_trainer_create(cfg, trainer)
    for callback in [c for p in plugins for c in p.add_callbacks_post_trainer(cfg, trainer) if c]:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


# ms-swift


class OptimizerCallback:
    """ms-swift 4: how Trainer's optimizer and scheduler come about."""

    def __init__(self, args: Any, trainer: Any) -> None:
        self.args = args
        self.trainer = trainer

    def create_optimizer(self, model: Any = None) -> Any:
        kwargs = {} if model is None else {"model": model}
        return Trainer.create_optimizer(self.trainer, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any) -> Any:
        return Trainer.create_scheduler(self.trainer, num_training_steps, optimizer)


class Swift4Trainer(Trainer):
    """`SwiftMixin` of ms-swift 4: registries are asked before Trainer is set up."""

    def __init__(self, args: Any, optimizer: str | None, callbacks: list[str], **kw: Any) -> None:
        swift: Any = SimpleNamespace(**sys.modules["swift.optimizers"].__dict__)
        known: Any = sys.modules["swift.callbacks"].__dict__["callbacks_map"]
        self.optimizer_callback = swift.optimizers_map[optimizer or "default"](args, self)
        super().__init__(args=args, callbacks=[known[c](args, self) for c in callbacks], **kw)

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [group for group in groups if len(group["params"]) > 0]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = self.optimizer_callback.create_scheduler(num_training_steps, optimizer)
        return self.lr_scheduler


class Swift3Trainer(Trainer):
    """`SwiftMixin` of ms-swift 3: a registered function may leave the work to Trainer."""

    swift_optimizer: str | None = None

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        if self.swift_optimizer is None:
            super().create_optimizer_and_scheduler(num_training_steps)
            return
        known: Any = sys.modules["swift.plugin"].__dict__["optimizers_map"]
        create = known[self.swift_optimizer]
        self.optimizer, self.lr_scheduler = create(self.args, self.model, self.train_dataset)
        if self.optimizer is None:
            self.create_optimizer()
        if self.lr_scheduler is None:
            self.create_scheduler(num_training_steps, self.optimizer)


def swift4_train(
    out: Path, optimizer: str | None = None, callbacks: tuple[str, ...] = (), **options: Any
) -> Trainer:
    """`swift sft --optimizer NAME --callbacks NAME`, after the plugins were imported."""
    trainer = Swift4Trainer(
        arguments(out, optim="adamw_torch", **options),
        optimizer,
        list(callbacks),
        model=TinyModel(),
        train_dataset=dataset(),
    )
    trainer.train()
    return trainer


def swift3_train(out: Path, optimizer: str | None = None, **options: Any) -> Trainer:
    """The same in version 3, where `extra_callbacks` go to every run."""
    extra: Any = sys.modules["swift.plugin"].__dict__["extra_callbacks"]
    trainer = Swift3Trainer(
        model=TinyModel(),  # type: ignore[arg-type]
        args=arguments(out, optim="adamw_torch", **options),
        train_dataset=dataset(),  # type: ignore[arg-type]
        callbacks=[*extra],
    )
    trainer.swift_optimizer = optimizer
    trainer.create_optimizer_and_scheduler(num_training_steps=100)  # transformers 4 calls it
    trainer.train()
    return trainer
