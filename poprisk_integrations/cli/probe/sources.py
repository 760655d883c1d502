"""What can be probed: a function, a LightningModule, or the training of a DPO config."""

# transformers leaves some of its functions untyped.
# mypy: disable-error-code="no-untyped-call"

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import operator
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.output import held_back, only_errors
from poprisk_integrations.cli.probe.watch import RateWatch, StepWatch

__all__ = ["RunSizes", "find_target", "watch_training"]

Watch = StepWatch | RateWatch
_ONLY_LIGHTNING = ("datamodule", "init_args", "trainer_args")
_QUIET_TRAINER = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}
# The training itself stays as it is, its schedule included: the watch ends it early.
_NOTHING_WRITTEN = (
    *("--save_strategy", "no"),
    *("--eval_strategy", "no"),
    *("--load_best_model_at_end", "false"),
    *("--report_to", "none"),
    *("--push_to_hub", "false"),
    *("--disable_tqdm", "true"),
    *("--stop", "false"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSizes:
    """Sizes of a run; None for what is not known."""

    batch_size: int | None = None  # examples per optimizer step, over accumulation and ranks
    dataset_size: int | None = None
    epoch_steps: int | None = None  # optimizer steps of one pass over the data
    total_steps: int | None = None  # of the whole run

    def or_else(self, other: "RunSizes") -> "RunSizes":
        """These sizes; those of `other` where they are not known.

        The length of a pass follows from data set and batch where only these were given.

        Example:
            >>> RunSizes(batch_size=8).or_else(RunSizes(batch_size=4, dataset_size=20)).epoch_steps
            3
        """
        batch = self.batch_size or other.batch_size
        data = self.dataset_size or other.dataset_size
        epoch = self.epoch_steps
        if epoch is None and not (self.batch_size or self.dataset_size):
            epoch = other.epoch_steps
        if epoch is None and batch and data:
            epoch = -(-data // batch)
        total = self.total_steps or other.total_steps
        return RunSizes(batch_size=batch, dataset_size=data, epoch_steps=epoch, total_steps=total)


def find_target(args: argparse.Namespace) -> str | None:
    """The MODULE:NAME among what argparse did not know; None where there is a config."""
    if args.config is not None:
        _refuse_lightning_options(args, "a LightningModule, not for a config")
        return None
    targets: list[str] = [part for part in args.rest if not part.startswith("-")]
    if len(targets) < len(args.rest):
        raise UsageError(f"unrecognized arguments: {' '.join(args.rest)}")
    if len(targets) != 1:
        raise UsageError("give one MODULE:NAME, or --config CONFIG.yaml (see `poprisk probe -h`)")
    return targets[0]


def _refuse_lightning_options(args: argparse.Namespace, what_for: str) -> None:
    for name in _ONLY_LIGHTNING:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for {what_for}")


def watch_training(args: argparse.Namespace, target: str | None, watch: Watch) -> RunSizes:
    """Train what `find_target` found under the watch; the sizes that the training shows."""
    if target is None:
        return _watch_dpo(args.config, args.rest, watch)
    found = _load(target)
    # Under either import name of Lightning, without importing it.
    is_module = inspect.isclass(found) and any(
        base.__name__ == "LightningModule" and "lightning" in base.__module__
        for base in found.__mro__
    )
    try:
        if is_module:
            return _watch_lightning_module(found, args, watch)
        _refuse_lightning_options(args, "a LightningModule class")
        return _watch_function(found, target, watch)
    except ValueError as error:
        if "empty parameter list" in str(error):  # torch's words
            raise UsageError("the optimizer has no trainable parameter") from error
        raise


def _load(target: str) -> Any:
    """The object that `package.module:name` or `path/file.py:name` names.

    As for a script, the current directory (or that of the file) comes first on the path.
    """
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise UsageError(
            f"{target!r} is no target: give package.module:NAME or path/file.py:NAME, "
            "or --config CONFIG.yaml"
        )
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise UsageError(f"no script at {place!r}")
    try:
        if path.suffix == ".py":
            sys.path.insert(0, str(path.resolve().parent))
            found: Any = _import_file(path)
        else:
            sys.path.insert(0, os.getcwd())
            found = importlib.import_module(place)
    except Exception as error:  # whatever the module itself raises
        is_named = isinstance(error, ImportError)
        cause = one_line(error) if is_named else f"{type(error).__name__}: {error}"
        raise UsageError(f"cannot import {place!r}: {cause}") from error
    try:
        return operator.attrgetter(name)(found)
    except AttributeError:
        raise UsageError(f"{place!r} has no {name!r}") from None


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception:
        del sys.modules[path.stem]
        raise
    return module


def _watch_function(function: Any, target: str, watch: Watch) -> RunSizes:
    """Call it; what it prints goes to stderr, and it sees no arguments."""
    if not callable(function):
        raise UsageError(f"{target!r} is neither a function nor a LightningModule class")
    if inspect.isclass(function):
        raise UsageError(f"{target!r} is a class, but no LightningModule")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # builtins without a signature
        parameters = []
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise UsageError(f"{target!r} needs arguments ({', '.join(needed)}): give one without")
    argv, sys.argv = sys.argv, [target]
    try:
        with contextlib.redirect_stdout(sys.stderr), watch:
            function()
    except SystemExit as error:
        if error.code not in (None, 0):
            raise UsageError(f"{target!r} exited with {error.code!r}") from error
    finally:
        sys.argv = argv
    return RunSizes()


def _watch_lightning_module(target: Any, args: argparse.Namespace, watch: Watch) -> RunSizes:
    """Fit an instance: no logger, checkpoint, validation or output file."""
    from poprisk_integrations.lightning._upstream import MisconfigurationException, Trainer

    with TemporaryDirectory(prefix="poprisk-probe-") as directory, _quiet_lightning():
        module = _build(target, args.init_args or {}, "--init-args")
        data = None
        if args.datamodule is not None:
            data = _build(_load(args.datamodule), {}, "--datamodule")
        options = {
            "max_steps": args.total_steps or watch.limit,  # schedules may depend on it
            "default_root_dir": directory,
            **_QUIET_TRAINER,
            **(args.trainer_args or {}),
        }
        try:
            trainer = Trainer(**options)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UsageError(f"Invalid --trainer-args: {one_line(error)}") from error
        try:
            with watch:
                trainer.fit(module, datamodule=data)
        except MisconfigurationException as error:
            if watch.watched:
                raise
            hint = "" if data is not None else " (or give --datamodule)"
            raise UsageError(f"{one_line(error)}{hint}") from error
        return _sizes_of_lightning(trainer, args.total_steps)


def _build(target: Any, arguments: Mapping[str, Any], option: str) -> Any:
    if not callable(target):
        raise UsageError(f"Invalid {option}: {target!r} is no class")
    try:
        return target(**arguments)
    except TypeError as error:
        raise UsageError(f"Invalid {option}: {one_line(error)}") from error


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Prints go to stderr; Lightning's advice about logging and workers is not for a probe."""
    names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    with only_errors(*names), warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        yield


def _sizes_of_lightning(trainer: Any, total_steps: int | None) -> RunSizes:
    from poprisk_integrations.lightning._upstream import loader_batch_size, steps_per_epoch

    batch = loader_batch_size(trainer)
    if batch is not None:
        batch *= trainer.accumulate_grad_batches * trainer.world_size
    data: Any = getattr(trainer.train_dataloader, "dataset", None)
    return RunSizes(
        batch_size=batch,
        dataset_size=len(data) if hasattr(data, "__len__") else None,
        epoch_steps=steps_per_epoch(trainer),
        total_steps=total_steps,
    )


def _watch_dpo(config: Path, changes: Sequence[str], watch: Watch) -> RunSizes:
    """Train as `poprisk dpo` would, in a temporary directory, without saving, evaluation or stop.

    `changes` are `--key value ...`, which win over the config.
    """
    require("transformers", "datasets", "trl", "peft", extra="trl")
    from poprisk_integrations.cli.dpo import build_trainer
    from poprisk_integrations.cli.dpo_config import check_config, parse_config
    from poprisk_integrations.diagnostics.data_pass import batch_count
    from poprisk_integrations.diagnostics.run_length import epoch_steps
    from poprisk_integrations.huggingface.run_facts import global_batch_size

    check_config(config)
    if not config.is_file():
        raise UsageError(f"no config at {str(config)!r}")
    with TemporaryDirectory(prefix="poprisk-probe-") as directory, held_back():
        arguments = ["--config", str(config), *changes, *_NOTHING_WRITTEN]
        try:
            trainer = build_trainer(parse_config([*arguments, "--output_dir", directory]))
        except (ValueError, OSError) as error:
            raise UsageError(one_line(error)) from error
        with watch:
            trainer.train()
        args = trainer.args
        data: Any = trainer.train_dataset
        accumulation, loader = args.gradient_accumulation_steps, trainer.get_train_dataloader()
        return RunSizes(
            batch_size=global_batch_size(args, trainer.accelerator),
            dataset_size=len(data) if hasattr(data, "__len__") else None,
            epoch_steps=epoch_steps(batch_count(loader), accumulation),
            total_steps=trainer.state.max_steps or None,
        )
