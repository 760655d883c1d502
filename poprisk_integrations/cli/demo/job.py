"""The whole demo: text, model, pairs, DPO runs, results."""

import math
import platform
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
import trl
from torch import Tensor

from poprisk_integrations import __version__
from poprisk_integrations.cli.demo import corpus, language_model
from poprisk_integrations.cli.demo.findings import Arm, Comparison, Evidence, findings
from poprisk_integrations.cli.demo.progress import JobProgress
from poprisk_integrations.cli.demo.runs import OPTIMIZERS, DPOTask, RunResult, run_all
from poprisk_integrations.cli.demo.settings import DemoSettings
from poprisk_integrations.trl.label_flips import flipped_rows

__all__ = ["DemoResult", "paired", "phase_weights", "run_job"]

_THREADS = 2  # more do not speed up so small a model, and fix the rounding of sums
_PREPARE, _TUNE, _SAMPLE = "text and tokenizer", "fine-tuning the model", "sampling"
_DPO = "DPO, all runs"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo found; `record` is all of it as plain values, for `results.json`."""

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
    runs = len(OPTIMIZERS) * len(settings.learning_rates)
    return {
        _PREPARE: 0.02 * run,
        _TUNE: 3 * length * settings.sft_steps * settings.sft_batch_size,
        _SAMPLE: 3 * length * pairs,
        _DPO: 0.6 * runs * run,  # two at a time
    }


def run_job(settings: DemoSettings, *, seed: int, quick: bool, progress: JobProgress) -> DemoResult:
    """Run all phases on the CPU, offline; files go to a temporary directory that is removed.

    The same seed on the same machine with the same versions gives the same numbers. `quick` is only
    noted in the results and the findings.
    """
    plan = [(optimizer, rate) for rate in settings.learning_rates for optimizer in OPTIMIZERS]
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        with tempfile.TemporaryDirectory(prefix="poprisk-demo-") as scratch:
            make_task, data = _prepare(settings, seed, scratch, progress)
            progress.start(_DPO)
            total = len(plan) * settings.epochs * -(-data["train_pairs"] // settings.batch_size)
            runs = run_all(
                make_task,
                plan,
                seed=seed,
                scratch=scratch,
                on_progress=lambda steps: progress.update(steps / total),
            )
    finally:
        torch.set_num_threads(threads)
    progress.finish()
    scores = {(run.optimizer, run.learning_rate): run.heldout_scores for run in runs}

    def compare(first: Arm, second: Arm) -> Comparison:
        return paired(*(scores[a.optimizer, a.learning_rate][a.steps] for a in (first, second)))

    arms = [arm for run in runs for arm in _rows(run)]
    not_armed = sum(not run.stop_armed for run in runs)
    evidence = Evidence(arms, settings.learning_rate, compare, not_armed, quick)
    sentences = findings(evidence)
    record = {
        "schema_version": 1,
        "seed": seed,
        "quick": quick,
        "settings": {**asdict(settings), "learning_rates": settings.learning_rates},
        "data": data,
        "arms": [asdict(arm) for arm in arms],
        "comparisons": evidence.comparisons(),
        "findings": sentences,
        "runs": [run.to_json() for run in runs],
        "seconds": progress.seconds,
        "environment": {
            "poprisk_integrations": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "threads": _THREADS,
        },
    }
    return DemoResult(runs, arms, sentences, record)


def _prepare(
    settings: DemoSettings, seed: int, scratch: str, progress: JobProgress
) -> tuple[Callable[[], DPOTask], dict[str, Any]]:
    random.seed(seed)
    progress.start(_PREPARE)
    texts = corpus.reference_texts()
    tokenizer = corpus.train_tokenizer(texts, settings.vocab_size)
    documents = [tokenizer(text)["input_ids"] for text in texts]
    counts = (settings.heldout_pairs, settings.train_pairs)
    heldout_windows, train_windows, finetuning = corpus.split_corpus(
        documents, corpus.starts_word(tokenizer), settings, counts, seed
    )
    progress.start(_TUNE)
    model = language_model.build_model(settings, tokenizer, seed)
    loss = language_model.fine_tune(
        model,
        tokenizer,
        finetuning,
        settings,
        seed=seed,
        scratch=scratch,
        on_step=lambda step: progress.update(step / settings.sft_steps),
    )
    progress.start(_SAMPLE)
    windows = train_windows + heldout_windows
    samples = language_model.sample_continuations(
        model,
        tokenizer,
        [window.prompt for window in windows],
        settings.continuation_tokens,
        seed=seed,
        on_batch=lambda done: progress.update(done / len(windows)),
    )
    train = corpus.make_pairs(tokenizer, train_windows, samples[: len(train_windows)])
    swapped = flipped_rows(len(train), settings.swapped_share, seed)
    train = [replace(pair, swapped=row in swapped) for row, pair in enumerate(train)]
    heldout = corpus.make_pairs(tokenizer, heldout_windows, samples[len(train_windows) :])
    example = asdict(heldout[0])
    data = {
        "source": "pydoc_data.topics",
        "tokens": sum(map(len, documents)),
        "finetuning_windows": len(finetuning),
        "train_pairs": len(train),
        "swapped_pairs": len(swapped),
        "heldout_pairs": len(heldout),
        "model_parameters": model.num_parameters(),
        "finetuning_loss": loss,
        "example": {name: example[name] for name in ("prompt", "human", "sample")},
    }
    return partial(DPOTask, model, tokenizer, train, heldout, settings), data


def _rows(run: RunResult) -> Iterator[Arm]:
    """Two rows of a run: to its end, and to where the stop would have ended it."""
    last = run.points[-1].step
    for stop in (False, True):
        end = last if run.stop_step is None or not stop else run.stop_step
        points = [point for point in run.points if point.step <= end]
        peak = max(points, key=lambda point: (point.accuracy, -point.step))
        scores = run.heldout_scores[end]
        metrics = asdict(points[-1])
        yield Arm(
            optimizer=run.optimizer,
            stop=stop,
            learning_rate=run.learning_rate,
            steps=metrics.pop("step"),
            stopped=end < last,
            accuracy_se=float(scores.double().std()) / math.sqrt(len(scores)),
            peak_accuracy=peak.accuracy,
            peak_step=peak.step,
            finding=run.stop_finding if end < last else "",
            **metrics,
        )


def paired(first: Tensor, second: Tensor) -> Comparison:
    """Mean difference of the ranking scores of the same pairs, and the standard error of that mean.

    Example:
        >>> paired(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]))
        Comparison(difference=0.5, standard_error=0.5)
    """
    difference = first.double() - second.double()
    error = float(difference.std()) / math.sqrt(len(difference))
    return Comparison(float(difference.mean()), error)
