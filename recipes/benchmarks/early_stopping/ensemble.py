"""Trains all members of a task side by side and records what any stopping rule may look at.

Optimizers act coordinate by coordinate, so M models in stacked tensors train exactly as alone
(`tests/integration/test_benchmarks.py` compares one member with `GradientWindow`).
"""

import math
from typing import Any

import numpy as np
import torch
from tasks import Task
from torch import Tensor
from torch.func import functional_call, vmap

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.diagnostics import auto_window_steps

__all__ = ["LRS", "OPTIMIZERS", "train"]

OPTIMIZERS = ("AdamW", "PopRiskAdamW", "SGD")
LRS = {"AdamW": (3e-4, 1e-3, 3e-3), "PopRiskAdamW": (3e-4, 1e-3, 3e-3), "SGD": (0.01, 0.03, 0.1)}
EVALUATIONS_OF_A_STREAM = 20
LARGEST_RATIO = 100.0  # as in core.window


def make_optimizer(name: str, params: list[Tensor], lr: float, decay: float) -> Any:
    """One of the three, with its usual settings."""
    if name == "SGD":
        return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=1e-4)
    if name == "AdamW":
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay, foreach=True)
    return PopRiskAdamW(params, lr=lr, weight_decay=decay, false_open_rate=0.05, foreach=True)


def train(
    task: Task,
    optimizer_name: str,
    lr: float,
    batch_size: int,
    schedule: str = "constant",
    *,
    keep: float = 1.0,
    epochs: int | None = None,
) -> dict[str, np.ndarray]:
    """One run of all members.

    Args:
        task: Data and model.
        optimizer_name: One of `OPTIMIZERS`.
        lr: Peak learning rate.
        batch_size: Examples per step and member; a short last batch of an epoch is dropped.
        schedule: "constant" or "cosine" (to zero at the end of the run).
        keep: Share of the training set that is trained on; the rest is held out and evaluated.
        epochs: Instead of the task's.

    Returns:
        The trace: arrays by name, first axis evaluations or windows, second axis members.
        Statistics of windows and of fixed points are recorded for keep=1 only.
    """
    x, y = task.train
    size = round(task.size * keep)
    held = (x[:, size:], y[:, size:]) if keep < 1 else None
    x, y = x[:, :size], y[:, :size]
    model, params = _initial(task)
    names, values = list(params), list(params.values())
    optimizer = make_optimizer(optimizer_name, values, lr, task.weight_decay)
    epoch_steps = size // batch_size
    epochs = task.epochs if epochs is None else epochs
    total = epochs * epoch_steps
    window = auto_window_steps(total, None if task.stream else epoch_steps)
    every = total // EVALUATIONS_OF_A_STREAM if task.stream else epoch_steps
    loss_of = vmap(lambda p, a, b: task.loss(functional_call(model, p, (a,)), b))
    predict = vmap(lambda p, a: functional_call(model, p, (a,)))
    evaluate = _Evaluator(task, predict, (x, y), held)
    recorder = _Recorder(values)
    at_point = _PointStatistics(loss_of, names, values, x, y, batch_size)
    member = torch.arange(x.shape[0])[:, None]
    watched = keep == 1.0

    generator = torch.Generator().manual_seed(17)
    evaluate(params, at_step=0)
    lr_sum, step = 0.0, 0
    for _ in range(epochs):
        order = torch.rand(x.shape[:2], generator=generator).argsort(1)
        for i in range(epoch_steps):
            rows = order[:, i * batch_size : (i + 1) * batch_size]
            losses = loss_of(params, x[member, rows], y[member, rows])
            losses.sum().backward()
            if schedule == "cosine":
                for group in optimizer.param_groups:
                    group["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / total))
            lr_sum += optimizer.param_groups[0]["lr"]
            step += 1
            if watched:
                recorder.add(losses.detach())
            optimizer.step()
            optimizer.zero_grad()
            if watched and step % window == 0:
                recorder.close(step, lr_sum)
            if step % every == 0:
                evaluate(params, at_step=step)
                if watched and not task.stream:
                    at_point(step)
    trace = {**evaluate.arrays(), "epoch_steps": np.array(every), "total_steps": np.array(total)}
    trace["window_steps"] = np.array(window)
    trace["numel"] = np.array([v[0].numel() for v in values])
    if watched:
        trace |= recorder.arrays() | at_point.arrays()
        trace["lr"] = np.array(lr)
    return trace


def _initial(task: Task) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    models = []
    for member in task.members:
        torch.manual_seed(member["seed"])
        models.append(task.model())
    if task.init is not None:
        for model in models:
            model.load_state_dict(task.init)
    stacked = {
        name: torch.stack([dict(m.named_parameters())[name].detach() for m in models])
        for name, _ in models[0].named_parameters()
    }
    return models[0], {name: v.requires_grad_() for name, v in stacked.items()}


class _Evaluator:
    """Losses and accuracies of all members after an epoch."""

    def __init__(self, task: Task, predict: Any, train: Any, held: Any) -> None:
        self.task, self.predict, self.train, self.held = task, predict, train, held
        self.rows: dict[str, list[Any]] = {}
        self.last: Tensor | None = None

    @torch.no_grad()
    def __call__(self, params: dict[str, Tensor], at_step: int) -> None:
        task = self.task
        loss = vmap(task.loss)
        out = self.predict(params, task.test[0])
        self._note("eval_step", torch.tensor(at_step))
        self._note("test_loss", loss(out, task.test[1]))
        self._note("test_metric", task.metric(out, task.clean))
        if self.held is not None:
            out = self.predict(params, self.held[0])
            self._note("held_loss", loss(out, self.held[1]))
            if task.is_classification:
                hit = (out.argmax(-1) == self.held[1]).float().flatten(1).mean(1)
                self._note("held_accuracy", hit)
        elif not task.stream:
            out = self.predict(params, self.train[0])
            self._note("train_loss", loss(out, self.train[1]))
            if task.is_classification:
                labels = out.argmax(-1).flatten(1)
                self._note("train_accuracy", (labels == self.train[1].flatten(1)).float().mean(1))
                before = labels if self.last is None else self.last
                self._note("changed", (labels != before).float().sum(1))
                self.last = labels

    def _note(self, name: str, value: Tensor) -> None:
        self.rows.setdefault(name, []).append(value.numpy().copy())

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.stack(v).astype(np.float32) for name, v in self.rows.items()}


def _squares(tensors: list[Tensor]) -> Tensor:
    """Squared norms, shape (M, L)."""
    return torch.stack([t.flatten(1).square().sum(1) for t in tensors], 1)


class _Recorder:
    """Window statistics of all members; see `core.window` and the README for the names."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values = values
        self.previous: list[Tensor] | None = None
        self.first: list[Tensor] | None = None
        self.rows: dict[str, list[Any]] = {}
        self._open()

    def _open(self) -> None:
        self.sums = [torch.zeros_like(v) for v in self.values]
        self.sq = [torch.zeros_like(v) for v in self.values]
        self.start = [v.detach().clone() for v in self.values]
        self.norms: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.progress: list[Tensor] = []
        self.path: list[Tensor] = []

    @torch.no_grad()
    def add(self, losses: Tensor) -> None:
        grads = [v.grad for v in self.values]
        torch._foreach_add_(self.sums, grads)
        torch._foreach_addcmul_(self.sq, grads, grads)
        self.norms.append(_squares(grads))
        self.losses.append(losses)
        if self.previous is not None:
            moved = torch._foreach_sub(self.values, self.previous)
            dots = [(d * g).flatten(1).sum(1) for d, g in zip(moved, grads, strict=True)]
            self.progress.append(-torch.stack(dots).sum(0))
            self.path.append(_squares(moved).sum(1))
        self.previous = [v.detach().clone() for v in self.values]

    @torch.no_grad()
    def close(self, step: int, lr_sum: float) -> None:
        steps = len(self.norms)
        norms = torch.stack(self.norms)  # (T, M, L)
        signal, total = _squares(self.sums), norms.sum(0)
        noise = ((total - signal / steps) / (steps - 1)).clamp_min(1e-30)
        each = (norms / noise).double()  # |g|^2 / S per step, member, tensor
        progress = torch.stack(self.progress).double()
        note = {
            "step": np.array(step),
            "lr_sum": np.array(lr_sum),
            "signal": signal,
            "noise": noise,
            "norm_spread": each.std(0),
            "pooled_spread": (each * self._weights()).sum(-1).std(0),
            "loss": torch.stack(self.losses).mean(0),
            "progress": progress.mean(0),
            "progress_sd": progress.std(0),
            "progress_lag1": _lag1(progress),
            "path": torch.stack(self.path).sum(0),
            "net": _squares([v - s for v, s in zip(self.values, self.start, strict=True)]).sum(1),
        }
        note |= self._coordinatewise(steps)
        if self.first is None:
            self.first = [s.clone() for s in self.sums]
        note["with_first"] = sum(
            (a * f).flatten(1).sum(1) for a, f in zip(self.sums, self.first, strict=True)
        )
        for name, value in note.items():
            array = value.numpy() if isinstance(value, Tensor) else value
            self.rows.setdefault(name, []).append(array.astype(np.float32))
        self._open()

    def _weights(self) -> Tensor:
        numel = torch.tensor([float(v[0].numel()) for v in self.values])
        return numel / numel.sum()

    def _coordinatewise(self, steps: int) -> dict[str, Tensor]:
        """F whitened per coordinate, and weighted as Adam would."""
        white, count, adam_up, adam_down = 0.0, 0.0, 0.0, 0.0
        for a, q in zip(self.sums, self.sq, strict=True):
            s = (q - a.square() / steps) / (steps - 1)
            alive = q > 0
            ratio = torch.where(alive, a.square() / steps / s.clamp_min(1e-30), 0.0)
            ratio.clamp_(max=LARGEST_RATIO)
            white = white + ratio.flatten(1).sum(1)
            count = count + alive.float().flatten(1).sum(1)
            weight = torch.where(alive, (q / steps).clamp_min(1e-30).rsqrt(), 0.0)
            adam_up = adam_up + (weight * a.square()).flatten(1).sum(1) / steps
            adam_down = adam_down + (weight * s).flatten(1).sum(1)
        bias = (steps - 3) / (steps - 1)
        return {"white": white / count * bias, "adam": adam_up / adam_down.clamp_min(1e-30)}

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"w_{name}": np.stack(v) for name, v in self.rows.items()}


def _lag1(values: Tensor) -> Tensor:
    """Lag-1 autocorrelation over time, per member."""
    centred = values - values.mean(0)
    return (centred[1:] * centred[:-1]).sum(0) / centred.square().sum(0).clamp_min(1e-300)


class _PointStatistics:
    """What rivals need at fixed weights: K micro-batch gradients of the whole training set."""

    def __init__(self, loss_of: Any, names: list[str], values: list[Tensor], x, y, b: int) -> None:
        self.loss_of, self.names, self.values, self.x, self.y = loss_of, names, values, x, y
        self.size = max(1, min(b, x.shape[1] // 12))
        self.count = x.shape[1] // self.size
        self.rows: dict[str, list[np.ndarray]] = {}

    def __call__(self, step: int) -> None:
        total = [torch.zeros_like(v) for v in self.values]
        sq = [torch.zeros_like(v) for v in self.values]
        some: list[list[Tensor]] = []
        params = dict(zip(self.names, self.values, strict=True))
        for k in range(self.count):
            rows = slice(k * self.size, (k + 1) * self.size)
            loss = self.loss_of(params, self.x[:, rows], self.y[:, rows]).sum()
            grads = list(torch.autograd.grad(loss, self.values))
            torch._foreach_add_(total, grads)
            torch._foreach_addcmul_(sq, grads, grads)
            if k < 5:
                some.append(grads)
        k = self.count
        means = torch._foreach_div(total, float(k))
        spread = [(q - k * m.square()) / (k - 1) for q, m in zip(sq, means, strict=True)]
        ratio = sum(
            torch.where(s > 1e-12 * q, k * m.square() / s.clamp_min(1e-30), 0.0).flatten(1).sum(1)
            for s, q, m in zip(spread, sq, means, strict=True)
        )
        alive = sum(
            (s > 1e-12 * q).float().flatten(1).sum(1) for s, q in zip(spread, sq, strict=True)
        )
        u = _squares(means).sum(1) - sum(s.flatten(1).sum(1) for s in spread) / k
        pairs = [
            _squares(torch._foreach_sub(some[i], some[j])).sum(1).sqrt()
            for i in range(len(some))
            for j in range(i)
        ]
        note = {
            "eb": ratio / alive * (k - 3) / (k - 1),
            "u": u,
            "disparity": torch.stack(pairs).mean(0),
        }
        for name, value in note.items():
            self.rows.setdefault(name, []).append(value.detach().numpy().copy())

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"p_{name}": np.stack(v) for name, v in self.rows.items()}
