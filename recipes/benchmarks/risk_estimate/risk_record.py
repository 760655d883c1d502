"""One run: at each step what was predicted, and what the held-out loss did."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gate_harness.arms import BETAS
from risk_tasks import Problem, build
from step_estimators import OPTIMIZERS, Moments, leave_one_out_step, step_predictions
from torch import Tensor
from torch.func import grad_and_value, vmap

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core.noise import update_dev_sq_
from poprisk_integrations.core.risk import lagged_risk_decrease

__all__ = ["load", "record", "trace"]

WEIGHT_DECAY = 0.01


def trace(
    folder: Path, task: str, stream: bool, optimizer: str, lr: float, seed: int, quick: bool = False
) -> Path:
    """File of a run, made if it is missing."""
    kind = "stream" if stream else "reused"
    path = folder / f"{task}_{kind}_{optimizer}_{lr:g}_{seed}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        problem = build(task, seed, stream=stream, quick=quick)
        arrays = record(problem, optimizer, lr, seed)
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, **arrays)
        temporary.replace(path)
    return path


def load(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a run by name."""
    with np.load(path) as file:
        found = {name: file[name] for name in file.files if name != "var: both ends"}
    return {**found, "both ends": (found["leave-one-out"] + found["lagged"]) / 2}


def make_optimizer(name: str, weights: Tensor, lr: float) -> torch.optim.Optimizer:
    """AdamW or PopRiskAdamW, over one vector."""
    if name == "AdamW":
        return torch.optim.AdamW([weights], lr=lr, weight_decay=WEIGHT_DECAY, foreach=False)
    return PopRiskAdamW(
        [weights], lr=lr, weight_decay=WEIGHT_DECAY, false_open_rate=0.05, fused=False
    )


def record(problem: Problem, name: str, lr: float, seed: int) -> dict[str, np.ndarray]:
    """Train and measure.

    Returns:
        `held_loss`, shape (T + 1,), `epoch_steps`, and arrays of shape (T,), all decreases:
        `measured_a`, `measured_b` of the loss on the two halves of the held-out examples; `first
        order` (held-out gradient times step); `first order, both ends` (mean of the gradients
        before and after the step); `training set` (the training set's gradient times step, zero in
        a stream); `batch loss` (this batch's loss minus the next one's); each estimate, and
        `var: <name>`, its squared error where the batch gives one.
    """
    arm = OPTIMIZERS[name]
    weights = torch.nn.Parameter(problem.start())
    optimizer = make_optimizer(name, weights, lr)

    def loss_of_one(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return problem.per_example(w, x[None], y[None])[0]

    per_example = vmap(grad_and_value(loss_of_one), in_dims=(None, 0, 0))
    log: dict[str, list[float]] = {}

    def add(values: dict[str, Tensor | float]) -> None:
        for key, value in values.items():
            log.setdefault(key, []).append(float(value))

    zero = torch.zeros_like(weights.detach())
    state = Moments(exp_avg=zero, exp_avg_sq=zero, exp_dev_sq=zero, step=0)
    move, last_held, last_halves, last_loss = zero, zero, (0.0, 0.0), 0.0
    for step, (x, y) in enumerate(batches(problem, seed)):
        w = weights.detach().clone()
        grads, losses = per_example(w, x, y)
        gradient, loss = grads.mean(0), float(losses.mean())
        held, halves = full_gradient(problem, w, problem.held_x, problem.held_y)
        add({"held_loss": sum(halves) / 2})
        if step > 0:  # the step before, judged at where it led
            lagged = float(lagged_risk_decrease(move, gradient))
            lagged_error = float((grads @ move).var()) / len(grads)
            add(
                {
                    "measured_a": last_halves[0] - halves[0],
                    "measured_b": last_halves[1] - halves[1],
                    "first order, both ends": (last_held + held) @ move / 2,
                    "batch loss": last_loss - loss,
                    "lagged": lagged,
                    "var: lagged": lagged_error,
                    "both ends": (log["leave-one-out"][-1] + lagged) / 2,
                }
            )
        last_held, last_halves, last_loss = held, halves, loss
        if step == problem.steps:
            break
        before = state
        weights.grad = gradient
        optimizer.step()
        move = w - weights.detach()
        state = moments_of(optimizer, weights, gradient, before, arm.rho)
        found, errors = step_predictions(grads, move, state, arm, lr)
        found["leave-one-out"] = leave_one_out_step(w, grads, before, arm, lr, WEIGHT_DECAY)
        own = zero if problem.stream else full_gradient(problem, w, problem.x, problem.y)[0]
        add({"first order": held @ move, "training set": own @ move, **found})
        add({f"var: {key}": value for key, value in errors.items()})
        add({"var: leave-one-out": errors["exact"]})
    arrays = {key: np.array(values) for key, values in log.items()}
    return {**arrays, "epoch_steps": np.array(problem.epoch_steps)}


def batches(problem: Problem, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps + 1 of them: a stream in order, a set in a new order each epoch."""
    generator = torch.Generator().manual_seed(40_000 + seed)
    order = torch.arange(len(problem.x))
    for step in range(problem.steps + 1):
        within = step if problem.stream else step % problem.epoch_steps
        if within == 0 and not problem.stream:
            order = torch.randperm(len(problem.x), generator=generator)
        chosen = order[within * problem.batch_size : (within + 1) * problem.batch_size]
        yield problem.x[chosen], problem.y[chosen]


def full_gradient(
    problem: Problem, w: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, tuple[float, float]]:
    """Gradient of the mean loss over many examples, and the loss of even and odd examples."""
    w = w.requires_grad_()
    losses = problem.per_example(w, x, y)
    (gradient,) = torch.autograd.grad(losses.mean(), w)
    w.requires_grad_(False)
    exact = losses.detach().double()
    return gradient, (float(exact[::2].mean()), float(exact[1::2].mean()))


def moments_of(
    optimizer: torch.optim.Optimizer, weights: Tensor, gradient: Tensor, before: Moments, rho: float
) -> Moments:
    """State after a step; the noise is kept here, since AdamW has none."""
    noise, steps = before.exp_dev_sq.clone(), before.step
    if steps > 0:
        scale = 1 / (1 - BETAS[0] ** steps)
        update_dev_sq_(noise, gradient, before.exp_avg, rho, 1 - rho, scale)
    state = optimizer.state[weights]
    return Moments(
        exp_avg=state["exp_avg"].detach().clone(),
        exp_avg_sq=state["exp_avg_sq"].detach().clone(),
        exp_dev_sq=noise,
        step=steps + 1,
    )
