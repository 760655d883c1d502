"""The DPO runs of the demo: four ways to a model, from the same pairs and the same start.

Two run at a time: so small a model gains nothing from a second thread.
"""

import copy
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from poprisk_integrations.cli.demo.corpus import PreferencePair
from poprisk_integrations.cli.demo.progress import StepProgress
from poprisk_integrations.cli.demo.scoring import DPOTask, PairScorer, Point
from poprisk_integrations.cli.demo.settings import QUIET_RUN
from poprisk_integrations.cli.output import held_back
from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from poprisk_integrations.trl.cross_fit import CrossFit, cross_fit

__all__ = ["ARMS", "RunResult", "run_all"]

# What trl.DPOTrainer does, bit for bit.
_PLAIN: dict[str, Any] = {"optim": "adamw_torch", "noise": "off", "stop": False}
_WORKERS = 2
_THREADS = 1  # of a worker; fixed, since the number of threads changes the rounding of sums
_POLL_SECONDS = 0.5

# Of a worker process, set when it starts: what its runs share.
_task: DPOTask
_steps_done: "Synchronized[int]"


@dataclass(slots=True)
class RunResult:
    """What an arm ended in, and the way there."""

    arm: str
    end: Point  # of the model that is kept; its step is the last one of its training
    heldout_scores: Tensor  # ranking scores of the held-out pairs, of that model
    steps: int  # optimizer steps of all that was trained for it
    points: list[Point] = field(default_factory=list)  # after each epoch, from step 0 on
    found: CrossFit | None = None  # out of fold

    def to_json(self) -> dict[str, Any]:
        """Plain values of the way."""
        return {"arm": self.arm, "points": [asdict(point) for point in self.points]}


class _Recorder(TrainerCallback):
    """Measures after each epoch; `losses` are those of the pairs that were held out for it."""

    def __init__(self, held: Sequence[PreferencePair] = ()) -> None:
        self.measured: list[tuple[Point, Tensor]] = []
        self.losses: list[float] = []
        self._judge = PairScorer(_task.tokenizer, held, _task.reference) if held else None
        self._signs = torch.tensor([-1.0 if pair.swapped else 1.0 for pair in held])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(kwargs["model"], 0)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(kwargs["model"], state.global_step)

    def _measure(self, model: Any, step: int) -> None:
        self.measured.append(_task.measure(model, step))
        if self._judge is not None:
            ratios = self._judge.log_ratios(model)
            margins = _task.settings.beta * self._signs * (ratios[:, 0] - ratios[:, 1])
            self.losses.append(float(F.softplus(-margins).mean()))


def _trainer(
    train: Dataset,
    seed: int,
    scratch: str,
    *,
    judged: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> PopRiskDPOTrainer:
    """On a copy of the reference; `options` of the config, which are ours by default."""
    settings = _task.settings
    config = PopRiskDPOConfig(
        output_dir=scratch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        beta=settings.beta,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        seed=seed,
        **QUIET_RUN,
        **options,
    )
    return PopRiskDPOTrainer(
        model=copy.deepcopy(_task.reference),
        args=config,
        train_dataset=train,
        eval_dataset=judged,
        processing_class=_task.tokenizer,
        callbacks=[StepProgress(_count_step), *callbacks],
    )


def _to_the_end(arm: str, seed: int, scratch: str, **options: Any) -> RunResult:
    recorder = _Recorder()
    data = Dataset.from_list(_task.rows)
    trainer = _trainer(data, seed, scratch, callbacks=[recorder], **options)
    trainer.train()
    # With the stop, the model at the end is that of the run's best moment.
    model: Any = trainer.model
    end, scores = _task.measure(model, trainer.state.global_step)
    points = [point for point, _ in recorder.measured]
    return RunResult(arm, end, scores, trainer.state.global_step, points)


def plain(seed: int, scratch: str) -> RunResult:
    """AdamW on all pairs, to the planned end."""
    return _to_the_end("plain", seed, scratch, **_PLAIN)


def ours(seed: int, scratch: str) -> RunResult:
    """PopRiskDPOTrainer as it comes: the gate, and the stop that needs no held-out pairs."""
    return _to_the_end("ours", seed, scratch)


def held_out(seed: int, scratch: str) -> RunResult:
    """AdamW on nine tenths; of its epochs the one with the least loss on the noisy tenth."""
    order = list(range(len(_task.pairs)))
    random.Random(seed).shuffle(order)
    held = [_task.pairs[row] for row in order[: len(order) // 10]]
    recorder = _Recorder(held)
    data = Dataset.from_list([_task.rows[row] for row in sorted(order[len(held) :])])
    trainer = _trainer(data, seed, scratch, callbacks=[recorder], **_PLAIN)
    trainer.train()
    end, scores = recorder.measured[recorder.losses.index(min(recorder.losses))]
    points = [point for point, _ in recorder.measured]
    return RunResult("held out", end, scores, trainer.state.global_step, points)


def folds(seed: int, scratch: str) -> RunResult:
    """The mean of AdamW models, none of which has seen all pairs; no further training."""
    trainers: list[PopRiskDPOTrainer] = []

    def make_trainer(train: Dataset, judged: Dataset) -> PopRiskDPOTrainer:
        trainer = _trainer(train, seed, scratch, judged=judged, optim="adamw_torch", stop=False)
        trainers.append(trainer)
        return trainer

    data = Dataset.from_list(_task.rows)
    count = _task.settings.folds
    found = cross_fit(
        make_trainer, data, folds=count, seed=seed, directory=scratch, average_weights=True
    )
    steps = sum(trainer.state.global_step for trainer in trainers)
    found.load_weights(trainers[-1])
    model: Any = trainers[-1].model
    end, scores = _task.measure(model, steps)
    return RunResult("folds", end, scores, steps, found=found)


# The longest first.
ARMS: dict[str, Callable[[int, str], RunResult]] = {
    "folds": folds,
    "plain": plain,
    "held out": held_out,
    "ours": ours,
}


def run_all(
    make_task: Callable[[], DPOTask],
    *,
    seed: int,
    scratch: str,
    on_progress: Callable[[int], None],
) -> dict[str, RunResult]:
    """Run each arm; the same as if one after the other.

    `make_task` can be pickled; it is called once per worker. `on_progress` is called now and then
    with the number of steps done in all runs.
    """
    # Not by fork: a copy of a process with torch's threads may wait for ever for one of them.
    context = multiprocessing.get_context("spawn")
    steps: Synchronized[int] = context.Value("q", 0)
    with ProcessPoolExecutor(
        _WORKERS, mp_context=context, initializer=_start_worker, initargs=(make_task, steps)
    ) as pool:
        futures = [pool.submit(_run, arm, seed, f"{scratch}/{arm}") for arm in ARMS]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=_POLL_SECONDS)
                for future in done:
                    future.result()  # an error ends the job at once
                on_progress(steps.value)
        except BaseException:  # nobody wants the runs that are under way; also of Ctrl-C
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        return {arm: future.result() for arm, future in zip(ARMS, futures, strict=True)}


def _run(arm: str, seed: int, scratch: str) -> RunResult:
    with held_back():
        return ARMS[arm](seed, scratch)


def _start_worker(make_task: Callable[[], DPOTask], steps: Any) -> None:
    global _task, _steps_done
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(_THREADS)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with held_back():
        _task = make_task()
    _steps_done = steps


def _end_with_parent() -> None:
    """A killed parent cannot say goodbye; its workers must not train on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _count_step(_: int) -> None:
    with _steps_done.get_lock():
        _steps_done.value += 1
