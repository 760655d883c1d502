"""Probes the training that `poprisk dpo` would run."""

# transformers leaves some of its functions untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.probe.sizes import RunSizes
from poprisk_integrations.cli.probe.watch import StepWatch

__all__ = ["watch_recipe"]

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


def watch_recipe(config: Path, changes: Sequence[str], watch: StepWatch) -> RunSizes:
    """Train under the watch, in a temporary directory, without saving, evaluation or stop.

    Args:
        config: The recipe.
        changes: `--key value ...`, which win over it.
        watch: Not yet active.

    Returns:
        What the trainer knows of its run.

    Raises:
        UsageError: If the recipe, the model or the data cannot be used.
        ImportError: If the extra is missing.
    """
    require("transformers", "datasets", "trl", "peft", extra="trl")
    from poprisk_integrations.cli.commands.dpo import _build_trainer
    from poprisk_integrations.cli.demo.quiet import held_back
    from poprisk_integrations.cli.recipe import parse_recipe
    from poprisk_integrations.cli.recipe_index import check_config

    check_config(config)
    if not config.is_file():
        raise UsageError(f"no recipe at {str(config)!r}")
    with TemporaryDirectory(prefix="poprisk-probe-") as directory, held_back():
        arguments = ["--config", str(config), *changes, *_NOTHING_WRITTEN]
        try:
            recipe = parse_recipe([*arguments, "--output_dir", directory])
            trainer = _build_trainer(recipe)
        except (ValueError, OSError) as error:
            raise UsageError(one_line(error)) from error
        with watch:
            trainer.train()
        return _sizes(trainer)


def _sizes(trainer: Any) -> RunSizes:
    from poprisk_integrations.huggingface.callbacks.epoch_length import steps_per_epoch
    from poprisk_integrations.huggingface.global_batch import global_batch_size

    args, data = trainer.args, trainer.train_dataset
    return RunSizes(
        batch_size=global_batch_size(args, trainer.accelerator),
        dataset_size=len(data) if hasattr(data, "__len__") else None,
        epoch_steps=steps_per_epoch(
            trainer.get_train_dataloader(), args.gradient_accumulation_steps
        ),
        total_steps=trainer.state.max_steps or None,
    )
