"""The whole demo: text, model, pairs, their check, DPO runs, results."""

import math
import platform
import random
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor

from poprisk_integrations import __version__
from poprisk_integrations.cli.demo import corpus, language_model
from poprisk_integrations.cli.demo.findings import Arm, Comparison, Evidence, findings, next_steps
from poprisk_integrations.cli.demo.progress import JobProgress
from poprisk_integrations.cli.demo.runs import ARMS, RunResult, run_all
from poprisk_integrations.cli.demo.scoring import DPOTask
from poprisk_integrations.cli.demo.settings import DemoSettings
from poprisk_integrations.cli.flips.study import flips_found
from poprisk_integrations.trl.cross_fit import CrossFit
from poprisk_integrations.trl.label_flips import flipped_rows
from poprisk_integrations.trl.pair_checks import PairCheck, check_pairs

__all__ = ["DemoResult", "paired", "phase_weights", "run_job"]

_THREADS = 2  # more do not speed up so small a model, and fix the rounding of sums
_PREPARE, _TUNE, _SAMPLE = "text and tokenizer", "fine-tuning the model", "sampling"
_CHECK, _DPO = "checking the pairs", "DPO, all runs"
_SHOWN = 4  # suspects


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo found; `record` is all of it as plain values, for `results.json`."""

    check: PairCheck
    runs: Mapping[str, RunResult]
    arms: Mapping[str, Arm]
    judged: list[dict[str, Any]]  # of each training pair its P(wrong), and whether it was swapped
    suspects: list[dict[str, Any]]  # the first of them, with their texts
    sentences: list[str]
    advice: tuple[str, list[str]]
    record: dict[str, Any]


def _arm_names(settings: DemoSettings) -> dict[str, str]:
    """In the order of the table."""
    return {
        "plain": "AdamW to the end",
        "held out": "AdamW, a tenth held out",
        "ours": "PopRiskDPOTrainer",
        "folds": f"mean of {settings.folds} fold models",
    }


def _steps(settings: DemoSettings, pairs: int) -> int:
    """Of all runs, at most."""
    sizes = [pairs, pairs - pairs // 10, pairs]
    sizes += settings.folds * [pairs - pairs // settings.folds]
    return sum(settings.epochs * -(-size // settings.batch_size) for size in sizes)


def phase_weights(settings: DemoSettings) -> dict[str, float]:
    """Phase -> relative cost, for the progress bar: tokens seen, a step counting as three."""
    length = settings.prompt_tokens + settings.continuation_tokens
    pairs = settings.train_pairs + settings.heldout_pairs
    scored = len(ARMS) * settings.epochs * (settings.heldout_pairs + 2 * settings.fit_sample)
    trained = 3 * _steps(settings, settings.train_pairs) * settings.batch_size
    dpo = 0.6 * 2 * length * (trained + scored)  # two at a time
    return {
        _PREPARE: 0.01 * dpo,
        _TUNE: 3 * length * settings.sft_steps * settings.sft_batch_size,
        _SAMPLE: 3 * length * pairs,
        _CHECK: 0.01 * dpo,
        _DPO: dpo,
    }


def run_job(settings: DemoSettings, *, seed: int, quick: bool, progress: JobProgress) -> DemoResult:
    """Run all phases on the CPU, offline; files go to a temporary directory that is removed.

    The same seed on the same machine with the same versions gives the same numbers. `quick` is only
    noted in the results and the findings.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        with tempfile.TemporaryDirectory(prefix="poprisk-demo-") as scratch:
            task, data = _prepare(settings, seed, scratch, progress)
            tokenizer, train = task.args[1:3]
            progress.start(_CHECK)
            rows = Dataset.from_list([pair.row() for pair in train])
            check = check_pairs(rows, tokenizer=tokenizer)
            progress.start(_DPO)
            total = _steps(settings, len(train))
            runs = run_all(
                task,
                seed=seed,
                scratch=scratch,
                on_progress=lambda steps: progress.update(steps / total),
            )
    finally:
        torch.set_num_threads(threads)
    progress.finish()
    arms = {key: _arm(name, runs[key], runs["plain"]) for key, name in _arm_names(settings).items()}
    found = runs["folds"].found
    assert found is not None
    swapped = {row for row, pair in enumerate(train) if pair.swapped}
    evidence = Evidence(
        arms,
        lambda first, second: paired(runs[first].heldout_scores, runs[second].heldout_scores),
        flips_found(found.report, swapped),
        str(found.estimate),
        found.report.calibrated,
        len(swapped) / len(train),
        quick,
    )
    judged = _judged(found, swapped)
    suspects = [{**pair, **train[pair["row"]].row()} for pair in judged[:_SHOWN]]
    sentences, advice = findings(evidence), next_steps(evidence)
    record = {
        "schema_version": 2,
        "seed": seed,
        "quick": quick,
        "settings": asdict(settings),
        "data": data,
        "check": check.to_json(),
        "noise": found.estimate.to_json(),
        "suspects": {**evidence.suspects, "first": suspects},
        "fold_epochs": found.epochs,
        "arms": {key: asdict(arm) for key, arm in arms.items()},
        "comparisons": evidence.comparisons(),
        "findings": sentences,
        "next": {"why": advice[0], "commands": advice[1]},
        "runs": [run.to_json() for run in runs.values() if run.points],
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
    return DemoResult(check, runs, arms, judged, suspects, sentences, advice, record)


def _prepare(
    settings: DemoSettings, seed: int, scratch: str, progress: JobProgress
) -> tuple["partial[DPOTask]", dict[str, Any]]:
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


def _judged(found: CrossFit, swapped: set[int]) -> list[dict[str, Any]]:
    """The pairs that have a P(wrong), the most suspect first."""
    columns = ["pair_id", "row", "probability_wrong", "margin", "action"]
    table = found.report.top(len(found.report))[columns]
    return [{**pair, "swapped": pair["row"] in swapped} for pair in table.to_dict("records")]


def _arm(name: str, run: RunResult, plain: RunResult) -> Arm:
    metrics = asdict(run.end)
    del metrics["step"]
    peak = max(range(len(run.points)), key=lambda i: run.points[i].accuracy, default=None)
    return Arm(
        name=name,
        trainings=run.steps / plain.steps,
        accuracy_se=float(run.heldout_scores.double().std()) / math.sqrt(len(run.heldout_scores)),
        peak_accuracy=None if peak is None else run.points[peak].accuracy,
        peak_epoch=peak,
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
