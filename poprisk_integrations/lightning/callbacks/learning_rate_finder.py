"""`PopRiskLearningRateFinder`: short trainings before a fit, which leave no trace."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from poprisk_integrations.diagnostics.learning_rate_finder import (
    FinderOptions,
    LearningRateSuggestion,
    find_learning_rate,
)
from poprisk_integrations.diagnostics.learning_rate_scaling import scale_learning_rates
from poprisk_integrations.diagnostics.left_as_found import LeftAsFound
from poprisk_integrations.diagnostics.rate_probe import RateProbe, peak_rate
from poprisk_integrations.diagnostics.run_length import total_steps
from poprisk_integrations.diagnostics.without_traces import randomness_kept
from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_fast_dev_run,
    new_fit_loop,
    only_optimizer,
    parts_of,
    rank_zero_info,
    silent_logger,
    steps_per_epoch,
    strategy_is,
    train_dataloaders,
)

__all__ = ["PopRiskLearningRateFinder"]

_NAME = "PopRiskLearningRateFinder"


class PopRiskLearningRateFinder(Callback):
    """Searches for a learning rate before the fit, without validation data, and sets it.

    Each rate trains `steps` steps from the same weights on the same batches, with a short warm-up
    and a linear decay to zero, and is scored by the loss of the `score_batches` batches after
    them, which it has not seen. From `start` the search goes up by `factor` while that helps, else
    down; a parabola through the best three and the length of the run give the suggestion.

    The trainings are the trainer's own loop with its strategy, precision, accumulation and
    clipping; other callbacks and the loggers are left out, schedules too. Afterwards weights,
    optimizer, random numbers, loaders and loops are as before, and all learning rates and
    their schedules are multiplied so that the largest one is the suggestion. A run that resumes
    from a checkpoint keeps the checkpoint's rates.

    Args:
        steps: Optimizer steps with each rate, >= 20. Fewer if an epoch is short.
        score_batches: Optimizer steps' worth of batches that score a rate, >= 8.
        start: First rate to try, > 0; None for 1e-3, or 3e-2 with SGD.
        factor: Ratio of neighbouring rates, > 1.
        candidates: Most rates to try, >= 3; four or five are usual.
        horizon: Optimizer steps of the run that the rate is for; None for this fit's.
        update: Whether to set the suggestion; if not, it is only told.

    Attributes:
        results: A `LearningRateSuggestion` with `suggested`, `low`, `high`, `candidates`; None
            before the search.

    Raises:
        ValueError: If a value is outside its range; at the start of the fit if an epoch is too
            short or no rate trains.
        MisconfigurationException: At the start of the fit with manual optimization, an optimizer
            that evaluates more than one gradient in a step, or a sharded model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> finder = PopRiskLearningRateFinder(steps=50)
        >>> trainer = Trainer(callbacks=[finder], logger=False, enable_checkpointing=False)
        >>> finder.results is None
        True
    """

    def __init__(
        self,
        steps: int = 100,
        score_batches: int = 16,
        start: float | None = None,
        factor: float = 4.0,
        horizon: int | None = None,
        update: bool = True,
        *,
        candidates: int = 8,
    ) -> None:
        self._options = FinderOptions(
            steps=steps,
            score_batches=score_batches,
            start=start,
            factor=factor,
            candidates=candidates,
        )
        if horizon is not None and horizon < 1:
            raise ValueError(f"Invalid horizon: {horizon}. Must be >= 1 or None.")
        self._horizon = horizon
        self._update = update
        self.results: LearningRateSuggestion | None = None

    def plot(self, ax: Any = None) -> Any:
        """Draw losses over rates, the range and the suggestion, with matplotlib.

        Args:
            ax: Axes to draw into; None for a new figure.

        Returns:
            The axes.

        Raises:
            RuntimeError: Before the search.
        """
        if self.results is None:
            raise RuntimeError(f"{_NAME} has not searched yet: there is nothing to draw.")
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6.0, 3.6), layout="constrained").add_subplot()
        self.results.plot(ax)
        return ax

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, unless the fit is a trial run or goes on from a checkpoint."""
        if is_fast_dev_run(trainer) or trainer.ckpt_path is not None:
            return
        optimizer = only_optimizer(trainer, pl_module, _NAME)
        if strategy_is(trainer, "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"):
            raise MisconfigurationException(
                f"{_NAME} cannot put sharded weights back ({type(trainer.strategy).__name__}). "
                "Search on one device or under DDP, with as many examples in an optimizer step."
            )
        peaks = [peak_rate(group) for group in optimizer.param_groups]
        with randomness_kept(pl_module.device):
            loaders = train_dataloaders(trainer)
        found = LeftAsFound(
            pl_module,
            trainer.optimizers,
            owners=parts_of(trainer),
            stateful=filter(None, [getattr(trainer.precision_plugin, "scaler", None)]),
            generators=_generators(loaders),
        )
        with found():  # lengths are known once the loaders are
            trainer.fit_loop = new_fit_loop(trainer)
            trainer.fit_loop.setup_data()
            epoch_steps = steps_per_epoch(trainer)
        limits = total_steps(epoch_steps, trainer.max_epochs, trainer.max_steps)
        self.results = find_learning_rate(
            _training(trainer, found),
            self._options,
            optimizer=optimizer,
            epoch_steps=epoch_steps,
            total_steps=self._horizon or limits,
            bar=tqdm if trainer.progress_bar_callback and trainer.is_global_zero else None,
        )
        if self._update:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            factor = self.results.suggested / max(peaks)
            scale_learning_rates(trainer.optimizers, schedulers, factor)
        rank_zero_info(f"{_NAME}: {self.results}")
        told = {name: getattr(self.results, name) for name in ("suggested", "low", "high")}
        for logger in trainer.loggers:
            logger.log_metrics({f"poprisk/lr_{name}": rate for name, rate in told.items()}, step=0)


def _training(trainer: Any, found: LeftAsFound) -> Callable[[RateProbe], None]:
    def train(probe: RateProbe) -> None:
        with found():
            trainer.fit_loop = new_fit_loop(trainer)
            trainer.callbacks = [_ProbeCallback(probe)]
            trainer.loggers = [silent_logger()] if trainer.loggers else []
            trainer.limit_val_batches = 0
            trainer.strategy.lr_scheduler_configs = []
            trainer.fit_loop.run()

    return train


class _ProbeCallback(Callback):
    def __init__(self, probe: RateProbe) -> None:
        self._probe = probe

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._probe.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs:  # none where training_step skipped the batch
            self._probe.add(outputs if isinstance(outputs, torch.Tensor) else outputs["loss"])
        if trainer.global_step > self._probe.done:
            self._probe.after_step()
            trainer.should_stop = self._probe.is_over  # a limit of steps would announce itself


def _generators(loaders: list[Any]) -> Iterator[torch.Generator]:
    """The random numbers that users have given to their loaders and samplers."""
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(batch_sampler, "sampler", None), batch_sampler):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                yield generator
