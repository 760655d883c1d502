"""What callbacks that read every optimizer step of a Trainer through a window have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk_integrations.diagnostics.gradient_reader import GradientReader, fsdp1_group
from poprisk_integrations.diagnostics.guard import Guarded, guarded
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    Trainer,
    hook_scale,
    is_fast_dev_run,
    only_optimizer,
    rank_zero_info,
    rank_zero_warn,
    refuse_strategy,
    run_plan,
    run_shape,
)

__all__ = ["WindowCallback"]

# The state of a reader from before the first step.
_NOTHING = {"window": None, "reused": False, "passes": None, "owed_lr": None}


class WindowCallback(Guarded, Callback):
    """Owns a `GradientReader` while a fit lasts, and its part of the checkpoint.

    Subclasses call `_begin` in `on_train_start`, say at `_before_first_batch` what they can do, and
    do their work in `_after_step`. An unexpected error in mid-run switches the callback off.
    """

    _name: str
    window: Any
    accumulator: Any
    epoch_steps: int | None

    def _reset(self) -> None:
        self.switched_off = None
        self._reader: GradientReader | None = None  # from the first batch to the end of the fit
        self._is_awaited = False  # the first batch
        self._saved: dict[str, Any] | None = None  # of the reader, where there is none now
        self._saved_setup: dict[str, Any] = {}
        self._step = 0  # of the trainer's optimizer
        self._micro_batches = 0  # since then
        self._shape: tuple[Any, ...] = ()

    @abstractmethod
    def _before_first_batch(self, trainer: Trainer, reader: GradientReader) -> None:
        """One line about what this callback can do in this run."""

    @abstractmethod
    def _after_step(
        self, trainer: Trainer, pl_module: LightningModule, reader: GradientReader
    ) -> None:
        """Work after an optimizer step, at the end of its batch."""

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training; MisconfigurationException where gradients cannot be read."""
        refuse_strategy(trainer, self._name)
        only_optimizer(trainer, pl_module, self._name)
        self._is_awaited = not is_fast_dev_run(trainer)
        self._step, self._micro_batches = trainer.global_step, 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin, or continue the checkpoint's window, once per fit."""
        # Not in `on_train_start`: what other callbacks change before the first batch counts.
        if self._is_awaited:
            self._is_awaited = False
            self._shape = run_shape(trainer)
            reader = GradientReader(
                trainer.optimizers[0],
                run_plan(trainer, self.window, self.epoch_steps),
                accumulator=self.accumulator,
                shard_group=fsdp1_group(trainer.strategy.model),
                warn=self._warn,
            )
            self._resume(trainer, reader)
            self._reader = reader
            self._before_first_batch(trainer, reader)
            if reader.owed_lr is not None:
                self._after_step(trainer, pl_module, reader)
        elif batch_idx == 0 and trainer.world_size > 1:
            self._follow(trainer)

    @guarded
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count micro-batches. The count is not saved: Lightning drops their gradients too."""
        self._micro_batches += 1

    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take in this step's gradients and learning rate."""
        if self._reader is None:
            return
        # Without a backward pass the gradients are stale.
        micro_batches, self._micro_batches = self._micro_batches, 0
        if micro_batches and trainer.world_size == 1:  # several agree once an epoch
            self._follow(trainer)
        # Lightning divides the loss of each micro-batch by their number N in a step, also where an
        # epoch ends after k < N of them: N / k makes that a mean.
        scale: float | Tensor = trainer.accumulate_grad_batches / max(1, micro_batches)
        scale = scale * hook_scale(trainer, optimizer)
        self._reader.read(optimizer, self._step, scale=scale, count=micro_batches > 0)

    @guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide after an optimizer step, and log."""
        if self._reader is None:
            return
        self._reader.count_batch()
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._reader.step_ends()
            self._after_step(trainer, pl_module, self._reader)

    @guarded
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizer."""
        self.teardown(trainer, pl_module, "fit")

    @guarded
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer and of its device's memory."""
        if self._reader is not None:
            self._saved_setup = self._setup
            self._saved, self._reader = self._reader.release(), None
        self._is_awaited = False

    def switch_off(self, where: str, error: Exception) -> None:
        """Let go of the window too."""
        super().switch_off(where, error)
        self._reader = None

    def _settings(self) -> dict[str, Any]:
        """Settings on which no window depends, but decisions do."""
        return {}

    @property
    def _setup(self) -> dict[str, Any]:
        """Of this run once it has begun, else of the checkpoint's."""
        if self._reader is None:
            return self._saved_setup
        return {**self._settings(), **self._reader.setup}

    def _follow(self, trainer: Trainer) -> None:
        """Make a new plan if the run is another, and say what changed for windows."""
        shape = run_shape(trainer)
        is_other = shape != self._shape
        if trainer.world_size > 1:
            flag = torch.tensor(float(is_other), device=trainer.strategy.root_device)
            is_other = float(mean_over_ranks(flag)) > 0
        if not is_other or self._reader is None:
            return
        self._shape = shape
        plan = run_plan(trainer, self.window, self.epoch_steps)
        if changes := self._reader.follow(plan):
            rank_zero_info(
                f"{self._name}: {', '.join(changes)}; a window of {plan.window} steps starts here."
            )

    def _resume(self, trainer: Trainer, reader: GradientReader) -> None:
        """Continue the checkpoint's window, with one warning at most."""
        step, warning = trainer.global_step, None
        if step > 0 and self._saved is not None:
            warning = reader.resume(self._saved, step, self._saved_setup, self._settings())
        elif step > 0:
            warning = f"it knows nothing of the steps before {step}; what it counts starts there."
        self._saved = None
        if warning is not None:
            self._warn(warning)

    def _reader_state(self) -> dict[str, Any]:
        state = (self._saved or {}) if self._reader is None else self._reader.state_dict()
        return {**_NOTHING, **state, "setup": dict(self._setup)}

    def _load_reader_state(self, state_dict: Mapping[str, Any]) -> None:
        """The window follows when training starts and devices are known."""
        self._saved = {k: state_dict.get(k, none) for k, none in _NOTHING.items()}
        self._saved_setup = dict(state_dict.get("setup", {}))

    def _warn(self, line: str) -> None:
        rank_zero_warn(f"{self._name}: {line}")
