"""The whole demo: text, model, pairs, DPO runs, results."""

import dataclasses
import math
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
import trl
from torch import Tensor

from poprisk_integrations import __version__
from poprisk_integrations.cli.demo.comparison import Arm, best_arm, compare
from poprisk_integrations.cli.demo.corpus import CorpusSplit, reference_texts, split_corpus
from poprisk_integrations.cli.demo.dpo_runs import OPTIMIZERS, DPOTask, RunResult
from poprisk_integrations.cli.demo.findings import Evidence, findings
from poprisk_integrations.cli.demo.language_model import (
    build_model,
    fine_tune,
    sample_continuations,
)
from poprisk_integrations.cli.demo.parallel_runs import run_all
from poprisk_integrations.cli.demo.preference_pairs import make_pairs, swap_labels
from poprisk_integrations.cli.demo.progress import JobProgress
from poprisk_integrations.cli.demo.settings import DemoSettings
from poprisk_integrations.cli.demo.tokenizer import starts_word, train_tokenizer

__all__ = ["SCHEMA_VERSION", "DemoResult", "phase_weights", "run_job"]

SCHEMA_VERSION = 1

_THREADS = 2  # more do not speed up so small a model, and fix the rounding of sums
_PREPARE, _TUNE, _SAMPLE = "text and tokenizer", "fine-tuning the model", "sampling"
_DPO = "DPO, all runs"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo found.

    Attributes:
        settings: Its settings.
        runs: One per optimizer and learning rate.
        arms: Rows of the table.
        sentences: The findings.
        record: All of it as plain values, for `results.json`.
    """

    settings: DemoSettings
    runs: list[RunResult]
    arms: list[Arm]
    sentences: list[str]
    record: dict[str, Any]


def phase_weights(settings: DemoSettings) -> dict[str, float]:
    """Phase -> relative cost, for the progress bar: tokens seen, a step counting as three."""
    length = settings.prompt_tokens + settings.continuation_tokens
    pairs = settings.train_pairs + settings.heldout_pairs
    scored = settings.evaluations * (settings.heldout_pairs + 2 * settings.fit_sample)
    run = 2 * length * (3 * settings.epochs * settings.train_pairs + scored)
    fixed = {
        _PREPARE: 0.02 * run,
        _TUNE: 3 * length * settings.sft_steps * settings.sft_batch_size,
        _SAMPLE: 3 * length * pairs,
    }
    runs = len(OPTIMIZERS) * len(settings.learning_rates)
    return {**fixed, _DPO: 0.6 * runs * run}  # two at a time


def run_job(settings: DemoSettings, *, seed: int, quick: bool, progress: JobProgress) -> DemoResult:
    """Run all phases on the CPU, offline; files go to a temporary directory that is removed.

    The same seed on the same machine with the same versions gives the same numbers.

    Args:
        settings: Sizes and learning rates.
        seed: Of everything random.
        quick: Only noted in the results and the findings.
        progress: Told of every phase.
    """
    clock = _Clock(progress)
    plan = [(optimizer, rate) for rate in settings.learning_rates for optimizer in OPTIMIZERS]
    with _threads(_THREADS), tempfile.TemporaryDirectory(prefix="poprisk-demo-") as scratch:
        make_task, data = _prepare(settings, seed, scratch, clock)
        clock.start(_DPO)
        total = len(plan) * settings.epochs * -(-data["train_pairs"] // settings.batch_size)
        runs = run_all(
            make_task,
            plan,
            seed=seed,
            scratch=scratch,
            on_progress=lambda steps: progress.update(steps / total),
        )
    clock.stop()
    arms = [arm for run in runs for arm in _rows(run)]
    evidence = _evidence(settings, runs, arms, quick)
    sentences = findings(evidence)
    record = {
        "schema_version": SCHEMA_VERSION,
        "seed": seed,
        "quick": quick,
        "settings": {
            **dataclasses.asdict(settings),
            "learning_rate_factors": list(settings.learning_rate_factors),
            "learning_rates": list(settings.learning_rates),
        },
        "data": data,
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "comparisons": _comparisons_json(evidence),
        "findings": sentences,
        "runs": [run.to_json() for run in runs],
        "seconds": clock.seconds,
        "environment": _environment(),
    }
    return DemoResult(settings, runs, arms, sentences, record)


def _prepare(
    settings: DemoSettings, seed: int, scratch: str, clock: "_Clock"
) -> tuple[Callable[[], DPOTask], dict[str, Any]]:
    random.seed(seed)
    clock.start(_PREPARE)
    texts = reference_texts()
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    documents = [tokenizer(text)["input_ids"] for text in texts]
    split: CorpusSplit = split_corpus(
        documents,
        starts_word(tokenizer),
        block_tokens=settings.block_tokens,
        prompt_tokens=settings.prompt_tokens,
        continuation_tokens=settings.continuation_tokens,
        train=settings.train_pairs,
        heldout=settings.heldout_pairs,
        seed=seed,
    )
    clock.start(_TUNE)
    model = build_model(settings, tokenizer, seed)
    loss = fine_tune(
        model,
        tokenizer,
        split.finetuning,
        settings,
        seed=seed,
        scratch=scratch,
        on_step=lambda step: clock.progress.update(step / settings.sft_steps),
    )
    clock.start(_SAMPLE)
    windows = split.train + split.heldout
    samples = sample_continuations(
        model,
        tokenizer,
        [window.prompt for window in windows],
        settings.continuation_tokens,
        seed=seed,
        on_batch=lambda done: clock.progress.update(done / len(windows)),
    )
    first = len(split.train)
    train = swap_labels(
        make_pairs(tokenizer, split.train, samples[:first]), settings.swapped_share, seed=seed
    )
    heldout = make_pairs(tokenizer, split.heldout, samples[first:])
    example = heldout[0]
    data = {
        "source": "pydoc_data.topics",
        "tokens": sum(map(len, documents)),
        "finetuning_windows": len(split.finetuning),
        "train_pairs": len(train),
        "swapped_pairs": sum(pair.swapped for pair in train),
        "heldout_pairs": len(heldout),
        "model_parameters": model.num_parameters(),
        "finetuning_loss": loss,
        "example": {
            "prompt": example.prompt,
            "human": example.human,
            "sample": example.sample,
        },
    }
    return partial(DPOTask, model, tokenizer, train, heldout, settings), data


def _rows(run: RunResult) -> Iterator[Arm]:
    """Two rows of a run: to its end, and to where the stop would have ended it."""
    last = run.points[-1].step
    for stop in (False, True):
        stopped = stop and run.stop_step is not None and run.stop_step < last
        step = run.stop_step if stopped and run.stop_step is not None else last
        point = run.point_at(step)
        peak = max(
            (other for other in run.points if other.step <= step),
            key=lambda other: (other.accuracy, -other.step),
        )
        scores = run.heldout_scores[step]
        yield Arm(
            optimizer=run.optimizer,
            stop=stop,
            learning_rate=run.learning_rate,
            steps=step,
            stopped=stopped,
            accuracy=point.accuracy,
            accuracy_se=float(scores.double().std()) / math.sqrt(len(scores)),
            swapped_fitted=point.swapped_fitted,
            clean_fitted=point.clean_fitted,
            drift=point.drift,
            peak_accuracy=peak.accuracy,
            peak_step=peak.step,
            finding=run.stop_finding if stopped else "",
        )


def _evidence(
    settings: DemoSettings, runs: Sequence[RunResult], arms: Sequence[Arm], quick: bool
) -> Evidence:
    by_name = {(run.optimizer, run.learning_rate): run for run in runs}

    def scores(arm: Arm) -> Tensor:
        return by_name[arm.optimizer, arm.learning_rate].heldout_scores[arm.steps]

    def final(optimizer: str, rate: float) -> Tensor:
        run = by_name[optimizer, rate]
        return run.heldout_scores[run.points[-1].step]

    return Evidence(
        arms=arms,
        default_lr=settings.learning_rate,
        gate_vs_adamw={
            rate: compare(final("PopRiskAdamW", rate), final("AdamW", rate))
            for rate in settings.learning_rates
        },
        best_vs_best=compare(
            scores(best_arm(arms, "PopRiskAdamW")), scores(best_arm(arms, "AdamW"))
        ),
        stop_vs_end={
            (arm.optimizer, arm.learning_rate): compare(
                scores(arm), final(arm.optimizer, arm.learning_rate)
            )
            for arm in arms
            if arm.stopped
        },
        not_armed=sum(not run.armed for run in runs),
        quick=quick,
    )


def _comparisons_json(evidence: Evidence) -> list[dict[str, Any]]:
    """Accuracy of `first` minus that of `second`, paired over held-out pairs."""
    named = [
        ({"kind": "gate_vs_adamw", "learning_rate": rate}, comparison)
        for rate, comparison in evidence.gate_vs_adamw.items()
    ]
    named.append(({"kind": "best_vs_best"}, evidence.best_vs_best))
    named += [
        ({"kind": "stop_vs_end", "optimizer": name, "learning_rate": rate}, comparison)
        for (name, rate), comparison in evidence.stop_vs_end.items()
    ]
    return [
        {**name, **dataclasses.asdict(comparison), "verdict": comparison.verdict}
        for name, comparison in named
    ]


class _Clock:
    """Starts phases and keeps what each took."""

    def __init__(self, progress: JobProgress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._begin = 0.0

    def start(self, phase: str) -> None:
        self.stop()
        self._phase, self._begin = phase, time.perf_counter()
        self.progress.start(phase)

    def stop(self) -> None:
        if self._phase is not None:
            self.seconds[self._phase] = round(time.perf_counter() - self._begin, 2)
        self._phase = None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment() -> dict[str, Any]:
    return {
        "poprisk_integrations": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "threads": _THREADS,
    }
