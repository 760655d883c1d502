"""The DPO runs of the demo, two at a time: so small a model gains nothing from a second thread."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from poprisk_integrations.cli.demo.dpo_runs import DPOTask, RunResult, run_dpo

__all__ = ["run_all"]

_WORKERS = 2
_THREADS = 1  # fixed, since the number of threads changes the rounding of sums
_POLL_SECONDS = 0.5

# Of a worker process: what its runs share.
_task: DPOTask | None = None
_steps_done: "Synchronized[int] | None" = None


def run_all(
    make_task: Callable[[], DPOTask],
    plan: Sequence[tuple[str, float]],
    *,
    seed: int,
    scratch: str,
    on_progress: Callable[[int], None],
) -> list[RunResult]:
    """Results in the order of `plan`, the same as if run one after the other.

    Args:
        make_task: Builds data and reference, once per worker; can be pickled.
        plan: Optimizer and learning rate of each run.
        seed: Of the order of the pairs, the same for all runs.
        scratch: A directory for Trainer.
        on_progress: Called now and then with the number of steps done in all runs.
    """
    context = multiprocessing.get_context("spawn")
    steps: Synchronized[int] = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        _WORKERS, mp_context=context, initializer=_start_worker, initargs=(make_task, steps)
    )
    finished = False
    try:
        futures = [
            pool.submit(_run, optimizer, rate, seed, os.path.join(scratch, f"run{index}"))
            for index, (optimizer, rate) in enumerate(plan)
        ]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_POLL_SECONDS)
            for future in done:
                future.result()  # an error ends the job at once
            on_progress(steps.value)
        finished = True
        return [future.result() for future in futures]
    finally:
        workers = multiprocessing.active_children()
        pool.shutdown(wait=finished, cancel_futures=True)
        if not finished:  # an error or Ctrl-C: nobody wants the runs that are under way
            for worker in workers:
                worker.terminate()


def _start_worker(make_task: Callable[[], DPOTask], steps: Any) -> None:
    global _task, _steps_done
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from poprisk_integrations.cli.demo.quiet import held_back

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


def _run(optimizer: str, learning_rate: float, seed: int, scratch: str) -> RunResult:
    from poprisk_integrations.cli.demo.quiet import held_back

    assert _task is not None
    with held_back():
        return run_dpo(
            _task, optimizer, learning_rate, seed=seed, scratch=scratch, on_step=_count_step
        )


def _count_step(_: int) -> None:
    assert _steps_done is not None
    with _steps_done.get_lock():
        _steps_done.value += 1
