"""Probes a LightningModule."""

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from tempfile import TemporaryDirectory
from typing import Any

from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.probe.sizes import RunSizes
from poprisk_integrations.cli.probe.target import load_target
from poprisk_integrations.cli.probe.watch import StepWatch

__all__ = ["is_lightning_module", "watch_lightning_module"]

_QUIET_TRAINER = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}


def is_lightning_module(target: Any) -> bool:
    """Whether it is a class of Lightning's, under either import name, without importing it."""
    return inspect.isclass(target) and any(
        base.__name__ == "LightningModule" and "lightning" in base.__module__
        for base in target.__mro__
    )


def watch_lightning_module(
    target: Any,
    watch: StepWatch,
    *,
    datamodule: str | None = None,
    init_args: Mapping[str, Any] | None = None,
    trainer_args: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
) -> RunSizes:
    """Fit an instance under the watch: no logger, checkpoint, validation or output file.

    Args:
        target: The class.
        watch: Not yet active.
        datamodule: `module:Class` of the data; None for the module's own `train_dataloader`.
        init_args: Of the module.
        trainer_args: Further options of the Trainer, e.g. accumulate_grad_batches or precision.
        total_steps: Of the whole run, on which schedules may depend; None for the probe's steps.

    Returns:
        What the trainer knows of its run.

    Raises:
        UsageError: If module, data or trainer cannot be made.
    """
    from poprisk_integrations.lightning._upstream import MisconfigurationException, Trainer

    with TemporaryDirectory(prefix="poprisk-probe-") as directory, _quiet():
        module = _build(target, init_args or {}, "--init-args")
        data = None if datamodule is None else _build(load_target(datamodule), {}, "--datamodule")
        options = {
            "max_steps": total_steps or watch.limit,
            "default_root_dir": directory,
            **_QUIET_TRAINER,
            **(trainer_args or {}),
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
        return _sizes(trainer, total_steps)


def _build(target: Any, arguments: Mapping[str, Any], option: str) -> Any:
    if not callable(target):
        raise UsageError(f"Invalid {option}: {target!r} is no class")
    try:
        return target(**arguments)
    except TypeError as error:
        raise UsageError(f"Invalid {option}: {one_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Prints go to stderr; Lightning's advice about logging and workers is not for a probe."""
    names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _sizes(trainer: Any, total_steps: int | None) -> RunSizes:
    from poprisk_integrations.lightning.callbacks.run_length import (
        loader_batch_size,
        steps_per_epoch,
    )

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
