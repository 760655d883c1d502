"""Trains one model and records what any rule may look at: plain loops, one thread, float32."""

import copy
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from benchmarks.ordinary_use.conditions import Condition
from benchmarks.ordinary_use.data import Examples, Task
from benchmarks.ordinary_use.recorders import LIVE, SIZE, Average, Signal, Table, measured
from torch import Tensor, nn
from torch.optim import lr_scheduler

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.diagnostics.schedule_outlook import ScheduleOutlook

__all__ = ["COOLDOWN", "PATIENCE", "SHORT", "Plan", "run"]

PATIENCE = 10
WARM_UP = 0.1  # of the steps, in the cosine schedule
SHORT = 4  # epochs: up to here evaluations are twice as dense
COOLDOWN = 0.25  # steps of a cooldown, per step so far


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What kind of run."""

    hold: float = 0.0  # share of the examples that is held out
    epochs: int | None = None  # of run and schedule, instead of the condition's
    sit_out: bool = False  # whether some examples sit out, as the package has it
    signal: bool = False  # whether to record the gradient signal, for the shipped rule
    cool_from: tuple[int, ...] = ()  # epochs from whose end a cooldown on all data is tried
    only_end: bool = False  # whether nothing is evaluated but the end


def run(condition: Condition, task: Task, seed: int, plan: Plan) -> dict[str, np.ndarray]:
    """One run and its cooldowns.

    Returns:
        Arrays by name. At K evaluations: `at` (epochs done), `step`, `lr`, `train_loss` (mean of
        the batches since the last evaluation, before their update) and loss (with `_se`) and
        accuracy on `clean`, `noisy` and `held` examples, of the last weights and (`average_...`, at
        ends of epochs) of their polynomial average. Of all steps: `rates`. Where examples sit out,
        (E, n): `losses`, `accuracies` (NaN: not measured), `sits`, `positions`; and at the ends of
        epochs, of those who sat, `end_losses` and `end_average_losses`; and at the evaluations
        `noisy_loss_as_trained`, with dropout and augmentation. See also `Signal` and
        `Run._cool_downs`.
    """
    return Run(condition, task, seed, plan).result()


def make_optimizer(condition: Condition, model: nn.Module) -> torch.optim.Optimizer:
    """Over what the model trains."""
    params = [p for p in model.parameters() if p.requires_grad]
    if condition.optimizer == "SGD":
        return torch.optim.SGD(params, lr=condition.lr, momentum=0.9, weight_decay=1e-4, fused=True)
    decay = condition.weight_decay
    if condition.optimizer == "AdamW":
        return torch.optim.AdamW(params, lr=condition.lr, weight_decay=decay, fused=True)
    assert condition.optimizer == "PopRiskAdamW"
    return PopRiskAdamW(params, lr=condition.lr, weight_decay=decay, foreach=True)


def make_schedule(kind: str, optimizer: torch.optim.Optimizer, lr: float, total: int) -> Any:
    """A scheduler of torch over `total` steps; "plateau" is stepped at the end of an epoch."""
    if kind == "constant":
        return None
    if kind == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=5)
    if kind == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total + 1)
    if kind == "linear":
        return lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / total))
    assert kind == "cosine", kind
    warm = max(1, round(WARM_UP * total))

    def factor(t: int) -> float:
        if t < warm:
            return t / warm
        # Past the end only the scheduler's own last step asks.
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (t - warm) / max(1, total - warm)))

    return lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class Snapshot:
    """What a run needs to go on from here."""

    epoch: float
    step: int
    lr: float
    model: dict[str, Any]
    optimizer: dict[str, Any]


@dataclass
class Run:
    """One training run."""

    condition: Condition
    task: Task
    seed: int
    plan: Plan
    rows: dict[str, list[float]] = field(default_factory=dict)
    cooled: dict[str, list[float]] = field(default_factory=dict)
    found: dict[str, np.ndarray] = field(default_factory=dict)

    def result(self) -> dict[str, np.ndarray]:
        """Train, cool down from where the plan says, return the trace."""
        began = time.process_time()
        self._prepare()
        self._train()
        trained = time.process_time()
        self._cool_downs()
        arrays = {
            name: np.array(values, np.float32) for name, values in (self.rows | self.cooled).items()
        }
        return (
            arrays
            | self.found
            | {
                "epoch_steps": np.array(self.epoch_steps),
                "seconds": np.array([trained - began, time.process_time() - trained]),
            }
        )

    def _prepare(self) -> None:
        n = len(self.task.train)
        self.kept = n - round(n * self.plan.hold)
        self.data = self.task.train.part(slice(0, self.kept))
        self.held = self.task.train.part(slice(self.kept, n)) if self.plan.hold else None
        self.epochs = self.condition.epochs if self.plan.epochs is None else self.plan.epochs
        self.epoch_steps = math.ceil(self.kept / self.condition.batch)
        self.total = self.epochs * self.epoch_steps
        torch.manual_seed(10_000 + self.seed)
        self.model = self.task.model()
        self.optimizer = make_optimizer(self.condition, self.model)
        kind, lr = self.condition.schedule, self.condition.lr
        self.schedule = make_schedule(kind, self.optimizer, lr, self.total)
        self.by_plateau = kind == "plateau"
        self.order = torch.Generator().manual_seed(20_000 + self.seed)
        self.noise = torch.Generator().manual_seed(30_000 + self.seed)
        self.sitter_noise = torch.Generator().manual_seed(40_000 + self.seed)
        self.average = Average(self.model)
        self.step, self.rates = 0, np.zeros(self.total, np.float32)
        self.since: list[Tensor] = []
        self.table = None
        if self.plan.sit_out:
            outlook = ScheduleOutlook(self.optimizer, self.schedule, total_steps=self.total)
            self.table = Table(self.kept, self.epochs, self.epoch_steps, self.seed, outlook)
        self.signal = None
        if self.plan.signal:
            self.signal = Signal(self.model, self.total, self.epoch_steps)
        self.snapshots: list[Snapshot] = []
        self.best: Snapshot | None = None  # by held-out loss
        self.live: dict[int, Snapshot] = {}  # by the rules that watch

    def _train(self) -> None:
        parts = 2 if self.table is not None else 1
        if self.epochs <= SHORT:
            parts = 4 if self.table is not None else 2
        ends = [round(self.epoch_steps * k / parts) for k in range(1, parts)]
        self._evaluate(0.0, with_average=False)
        waited, lowest = 0, math.inf
        for epoch in range(self.epochs):
            order = torch.randperm(self.kept, generator=self.order)
            if self.table is not None:
                self.table.begin(epoch)
                order = order[~self.table.sits[order]]
            total_loss = 0.0
            for j, rows in enumerate(
                torch.tensor_split(order, self.epoch_steps)
                if self.table is not None
                else order.split(self.condition.batch)
            ):
                if j in ends:
                    self._evaluate(epoch + j / self.epoch_steps, with_average=False)
                if self.table is not None:
                    self._measure_sitters(j)
                loss, accuracy = self._step_on(rows)
                total_loss += loss.sum()
                if self.schedule is not None and not self.by_plateau:
                    self.schedule.step()
                if self.table is not None:
                    self.table.record(rows, loss, accuracy, j / self.epoch_steps)
                    if found := self.table.visited(rows, j):
                        snapshot = self._snapshot(self.step / self.epoch_steps)
                        self.live |= dict.fromkeys(found, snapshot)
            self._evaluate(epoch + 1.0)
            self._compare_with_average()
            watched = float(total_loss) / len(order)
            if self.held is not None:
                watched = self.rows["held_loss"][-1]
                waited = waited + 1
                if watched < lowest and waited <= PATIENCE:
                    lowest, waited, self.best = watched, 0, self._snapshot(epoch + 1)
            if self.by_plateau:
                self.schedule.step(watched)
            if epoch + 1 in self.plan.cool_from:
                self.snapshots.append(self._snapshot(epoch + 1))
        self.found["rates"] = self.rates
        if self.table is not None:
            self.found |= self.table.arrays()
        if self.signal is not None:
            self.found |= self.signal.arrays()

    def _step_on(self, rows: Tensor, plain: bool = False) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of a batch before its update; then the update."""
        self.model.train()
        loss, accuracy = self._losses(self.task.train, rows, self.noise)
        self.optimizer.zero_grad()
        loss.mean().backward()
        if not plain:
            self.rates[self.step] = self.optimizer.param_groups[0]["lr"]
            if self.signal is not None:
                self.signal.before_step(self.step + 1)
        self.optimizer.step()
        if not plain:
            self.step += 1
            self.average.update(self.step)
            self.since.append(loss.detach())
        return loss.detach(), accuracy

    def _losses(
        self, examples: Examples, rows: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        part = examples.part(rows)
        x = part.x if self.task.augment is None else self.task.augment(part.x, generator)
        return self.task.loss(self.model(x), part.y)

    @torch.no_grad()
    def _measure_sitters(self, j: int) -> None:
        """Those who are due before batch j, as in training but for the gradient."""
        assert self.table is not None
        rows = self.table.due(j, self.condition.batch)
        if rows is None:
            return
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.sitter_noise)))
            loss, accuracy = self._losses(self.task.train, rows, self.sitter_noise)
        self.table.record(rows, loss, accuracy, j / self.epoch_steps)

    @torch.no_grad()
    def _compare_with_average(self) -> None:
        """Losses of those who sat, of the last weights and of their average, as in evaluation."""
        if self.table is None or not bool(self.table.sits.any()):
            return
        rows = self.table.sits.nonzero().flatten()
        self.model.eval()
        for table, weights in ((self.table.last, nullcontext()), (self.table.mean, self.average)):
            with weights:
                for part in rows.split(SIZE):
                    examples = self.task.train.part(part)
                    loss, _ = self.task.loss(self.model(examples.x), examples.y)
                    table[self.table.epoch, part] = loss

    def _evaluate(self, at: float, with_average: bool = True) -> None:
        if self.plan.only_end and at < self.epochs:
            return
        lost = float(torch.cat(self.since).mean()) if self.since else math.nan
        self.since = []
        note = {
            "at": at,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": lost,
            **measured(self.model, self.task, self.held),
        }
        empty = {f"average_{name}": math.nan for name in note if "_" in name and name[0] in "cnh"}
        if with_average:
            with self.average:
                found = measured(self.model, self.task, self.held)
            empty = {f"average_{name}": value for name, value in found.items()}
        if self.table is not None:
            note["noisy_loss_as_trained"] = self._loss_as_trained(note["noisy_loss"])
        for name, value in (note | empty).items():
            self.rows.setdefault(name, []).append(value)

    @torch.no_grad()
    def _loss_as_trained(self, loss: float) -> float:
        """The noisy loss with dropout and augmentation: what losses in training estimate."""
        if self.task.augment is None and not self.task.has_dropout:
            return loss
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            parts = torch.arange(len(self.task.noisy)).split(SIZE)
            losses = [self._losses(self.task.noisy, p, self.sitter_noise)[0] for p in parts]
        return float(torch.cat(losses).mean())

    def _snapshot(self, epoch: float) -> Snapshot:
        return Snapshot(
            epoch=epoch,
            step=self.step,
            lr=self.optimizer.param_groups[0]["lr"],
            model=copy.deepcopy(self.model.state_dict()),
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
        )

    def _cool_downs(self) -> None:
        """`cool_from`: the epochs; `cool_clean_loss` and so on: after a cooldown from their ends.

        With held-out data there is one, from the best epoch before the patience ran out, and
        `long_clean_loss` and so on of one as long as the package's rule makes it. Where
        examples sit out, `live_from`, `live_best_...` and `live_cool_...` are of the best window
        by each of the rules that watched (of the whole run, or up to its stop): as it was, and
        cooled down; `live_short_...` for the first of them over a quarter of the steps so far.
        """
        if self.best is not None:
            # A schedule near its end would learn nothing from what was held out.
            least = 0.1 * self.condition.lr
            self._cool_down("cool", self.best, least=least)
            self._cool_down("long", self.best, least=least, share=LIVE["as shipped"].tail)
        for snapshot in self.snapshots:
            self._cool_down("cool", snapshot)
        rows = {}  # of snapshots, by their step: rules often agree
        for _, snapshot in sorted(self.live.items()):
            if snapshot.step not in rows:
                self.model.load_state_dict(snapshot.model)
                rows[snapshot.step] = len(rows)
                self._note("live_best", measured(self.model, self.task, None))
                self._cool_down("live_cool", snapshot, share=LIVE["as shipped"].tail)
            self._note("live", {"from": snapshot.epoch, "row": rows[snapshot.step]})
        if self.live:
            self._cool_down("live_short", self.live[0])

    def _cool_down(
        self, name: str, snapshot: Snapshot, *, least: float = 0.0, share: float = COOLDOWN
    ) -> None:
        """On all data, from the rate of that moment (or `least`) linearly to zero.

        It takes a share of the steps so far, and one epoch at least.
        """
        self.model.load_state_dict(snapshot.model)
        self.optimizer.load_state_dict(snapshot.optimizer)
        epoch_steps = math.ceil(len(self.task.train) / self.condition.batch)
        steps, lr = max(math.ceil(share * snapshot.step), epoch_steps), max(snapshot.lr, least)
        stream = self._stream(50_000 + self.seed)
        for k in range(steps if lr > 0 else 0):
            for group in self.optimizer.param_groups:
                group["lr"] = lr * (1 - k / steps)
            self._step_on(next(stream), plain=True)
        self._note(name, {"from": snapshot.epoch, **measured(self.model, self.task, None)})

    def _note(self, prefix: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.cooled.setdefault(f"{prefix}_{name}", []).append(value)

    def _stream(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.task.train), generator=generator)
            yield from order.split(self.condition.batch)
