"""The criterion "risk" for a Lightning Trainer: its loader, its forward passes, its lengths."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from poprisk_integrations.diagnostics.data_pass import batch_count, sit_out_refusal
from poprisk_integrations.diagnostics.risk_run import RiskRun
from poprisk_integrations.diagnostics.risk_stop import RiskStop
from poprisk_integrations.diagnostics.sitting_out import SittingOut
from poprisk_integrations.diagnostics.stop_options import StopOptions
from poprisk_integrations.lightning._upstream import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    loss_scale,
    only_optimizer,
    prepared_batch,
    strategy_is,
    takes,
)

__all__ = ["FitRisk"]


class FitRisk(RiskStop):
    """Has the examples of a fit sit out, and their losses recorded.

    Call `attach` in `setup`, `open` and `start` in `on_train_start`, `settle` before the first
    batch, then `before_batch`, `after_forward` and `after_batch` of each, `detach` in the end. All
    ranks.

    The loader is taken when Lightning has given it its sampler and before anything is drawn from
    it. Sitters go through the module's own `training_step`, in training mode, with `self.log`
    silent; what it writes elsewhere by itself (a tracker's own object) is not undone.
    """

    def __init__(self, options: StopOptions) -> None:
        super().__init__(options)
        self.prepared: RiskRun | None = None  # from when the loader is known, where there is an R
        self.refusal = ""  # why there is none
        self.is_single_pass = False  # because no example is seen twice
        self._loader: Any = None
        self._is_tried = False
        self._first: int | None = None  # batch of the epoch with which this fit started
        self._values: Mapping[str, Tensor] | None = None  # of the present batch
        self._is_trained_on = False  # the present batch

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at each loader that Lightning makes ready for training."""
        strategy, plain = trainer.strategy, trainer.strategy.process_dataloader

        def process_dataloader(dataloader: object) -> object:
            ready = plain(dataloader)
            if trainer.training:
                self._take(trainer, pl_module, ready)
            return ready

        vars(strategy)["process_dataloader"] = process_dataloader

    def detach(self, trainer: Trainer) -> None:
        """Give loader and strategy back as they were."""
        vars(trainer.strategy).pop("process_dataloader", None)
        if self.prepared is not None:
            self.prepared.close()

    def refuse(self, why: str) -> None:
        """Let everybody be trained on from here on."""
        self.refusal = self.refusal or why
        if self.prepared is not None:
            self.prepared.release()
            self.prepared.close()
            self.prepared = self.run = None

    def open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the run before its first batch is drawn; `refusal` says what was found."""
        if self.prepared is None:
            self.refusal = self.refusal or "Lightning made no loader ready for training"
            return
        why = ""
        try:
            only_optimizer(trainer, pl_module, "")
        except MisconfigurationException as error:
            why = str(error).strip()
        if trainer.train_dataloader is not self._loader:
            why = "the loader is one of a collection"
        if takes(pl_module, "dataloader_iter"):
            why = "training_step draws its batches itself (dataloader_iter)"
        if why:
            self.refuse(why)
            return
        try:
            self._try_out(trainer, pl_module)
        except Exception:  # of a module that is ready at its first batch only: tried again then
            self._is_tried = False

    def settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more at the first batch, if it could not be seen before; see `refusal`."""
        if not self._is_tried:
            try:
                self._try_out(trainer, pl_module)
            except Exception as error:  # whatever somebody's training_step does
                self.refuse(f"a forward pass to look at failed ({type(error).__name__}: {error})")

    def before_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the sitters that are due, and listen to the batch's forward pass."""
        run = self.run
        if run is None or not run.is_measuring:
            return
        number = self._number(batch_idx)
        run.measure_sitters(number, self._forward(trainer, pl_module, run))
        self._is_trained_on = False
        self._values = run.own_values(batch)
        if self._values is None:
            run.tap.start(len(run.handle.indices(number)))

    def after_forward(self, trainer: Trainer, loss: Tensor) -> None:
        """Take in what the batch's examples lose, before its backward pass."""
        self._is_trained_on = True
        if self.run is None or not self.run.tap.is_on:
            return
        if strategy_is(trainer, "FSDPStrategy"):  # whose hooks take any gradient for the step's
            self._values = self.run.tap.stop()
        else:
            scale = loss_scale(trainer) / trainer.accumulate_grad_batches
            self._values = self.run.tap.stop(loss, scale=scale)

    def after_batch(self, trainer: Trainer, batch_idx: int) -> bool:
        """Note the visit; whether a window ended with it, and was long enough."""
        if self.run is None:
            return False
        self.run.tap.stop()
        if self._is_trained_on:
            self.run.visited(self._number(batch_idx), self._values)
        self._values = None
        windows = len(self.history)
        self.batch_done(batch_idx, trainer.global_step)
        return len(self.history) > windows

    def _take(self, trainer: Trainer, pl_module: LightningModule, loader: Any) -> None:
        limit, length = trainer.limit_train_batches, batch_count(loader) or 0
        if self._loader is not None:
            why = "the trainer draws from several loaders"
        elif trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined] # set outside
            why = "loaders are made anew (reload_dataloaders_every_n_epochs)"
        else:
            taken = limit if isinstance(limit, int) else int(limit * length)
            why = sit_out_refusal(loader, taken)
        self._loader = loader
        if why:
            self.refuse(why)
            return
        epochs = _epochs(trainer, length)
        if epochs is not None and epochs <= 1:
            self.is_single_pass = True
            self.refuse("it is a single pass over the data")
            return
        experiment = SittingOut(
            len(loader.dataset),
            share=self.options.sit_out,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            epochs=epochs,
            device=trainer.strategy.root_device,
        )
        self.prepared = RiskRun(
            loader,
            pl_module,
            experiment=experiment,
            example_losses=self.options.example_losses,
            on_pass=lambda: experiment.begin_epoch(trainer.current_epoch),
        )

    def _try_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.prepared is not None
        self._is_tried = True
        if why := self.prepared.try_out(self._forward(trainer, pl_module, self.prepared)):
            self.refuse(why)

    def _forward(
        self, trainer: Trainer, pl_module: LightningModule, run: RiskRun
    ) -> Callable[[Any], Any]:
        def forward(batch: Any) -> Any:
            batch = prepared_batch(trainer, pl_module, batch)
            if self.options.example_losses is not None:
                return run.own_values(batch)
            return _silent_step(trainer, pl_module, batch)

        return forward

    def _number(self, batch_idx: int) -> int:
        """Of a batch among those drawn: a fit that goes on in mid-epoch draws from the start."""
        if self._first is None or batch_idx == 0:
            self._first = batch_idx
        return batch_idx - self._first


def _silent_step(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor | None:
    """The loss of a training step that logs nothing."""
    arguments = (batch, 0) if takes(pl_module, "batch_idx", least=2) else (batch,)
    own: dict[str, Any] = vars(pl_module)  # where they hide the methods of the class
    before: dict[str, Any] = {name: own[name] for name in ("log", "log_dict") if name in own}
    own["log"] = own["log_dict"] = lambda *args, **kwargs: None
    try:
        output = trainer.strategy.training_step(*arguments)
    finally:
        del own["log"], own["log_dict"]
        own.update(before)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _epochs(trainer: Trainer, batches: int) -> float | None:
    """Planned passes over the data."""
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(float(trainer.max_epochs))
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps / math.ceil(batches / trainer.accumulate_grad_batches))
    return min(limits, default=None)
