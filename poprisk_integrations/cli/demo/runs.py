"""The DPO runs: what is measured on the way, and where the stop would have ended them.

Two run at a time: so small a model gains nothing from a second thread.
"""

import copy
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from poprisk_integrations.cli.demo.corpus import PreferencePair
from poprisk_integrations.cli.demo.progress import StepProgress
from poprisk_integrations.cli.demo.settings import QUIET_RUN, DemoSettings
from poprisk_integrations.cli.output import held_back
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer

__all__ = ["OPTIMIZERS", "DPOTask", "Point", "RunResult", "run_all"]

# Name in the results -> TrainingArguments.optim.
OPTIMIZERS = {"AdamW": "adamw_torch", "PopRiskAdamW": "poprisk_adamw"}

_GATE_STATISTICS = ("open_fraction", "mean_gate", "update_norm_ratio")
_BATCH = 64  # pairs scored at a time
_WORKERS = 2
_THREADS = 1  # of a worker; fixed, since the number of threads changes the rounding of sums
_POLL_SECONDS = 0.5

# Of a worker process, set when it starts: what its runs share.
_task: "DPOTask"
_steps_done: "Synchronized[int]"


@dataclass(frozen=True, slots=True)
class Point:
    """The metrics after `step` optimizer steps."""

    step: int
    accuracy: float  # share of held-out pairs with the human continuation ranked first
    swapped_fitted: float  # share of (a sample of) the swapped pairs ranked as their wrong label
    clean_fitted: float  # share of (a sample of) the other training pairs ranked as labelled
    drift: float  # mean over held-out continuations of |beta * log(policy / reference)|


@dataclass(slots=True)
class RunResult:
    """A run of `optimizer` at `learning_rate`."""

    optimizer: str
    learning_rate: float
    stop_step: int | None = None  # where the stop would have ended the run, if anywhere
    stop_reason: str = ""  # the stop's own words
    stop_finding: str = ""  # what the windows said at the stop
    stop_armed: bool = False  # whether the stop ever saw signal enough to be armed
    signal_ratio: list[dict[str, Any]] = field(default_factory=list)  # F of every window, at a step
    gate: dict[str, float] = field(default_factory=dict)  # statistics of the last sampled step
    points: list[Point] = field(default_factory=list)  # from step 0 to the end
    # Ranking scores of the held-out pairs at each of these steps.
    heldout_scores: dict[int, Tensor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the per-pair scores."""
        return {name: value for name, value in asdict(self).items() if name != "heldout_scores"}


def ranking_scores(log_ratios: Tensor) -> Tensor:
    """1 where the policy's implicit reward ranks the first of two above the second, 0.5 on ties.

    The reward of a continuation is beta * log(policy / reference), so beta does not matter here,
    and at the start of training every pair is a tie.

    Example:
        >>> ranking_scores(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])).tolist()
        [1.0, 0.0, 0.5]
    """
    return 0.5 * ((log_ratios[:, 0] - log_ratios[:, 1]).sign() + 1.0)


class PairScorer:
    """Log-ratios policy / reference of fixed pairs; the reference is scored once.

    Tokens are those that TRL trains on: prompt, continuation and end-of-sequence token, of which
    the last two count.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pairs: Sequence[PreferencePair],
        reference: nn.Module,
    ) -> None:
        self._tokenizer = tokenizer
        self._batches = [self._collate(pairs[i : i + _BATCH]) for i in range(0, len(pairs), _BATCH)]
        self._reference = self._log_probs(reference)

    def log_ratios(self, policy: nn.Module) -> Tensor:
        """Differences log policy - log reference, shape (n, 2): human continuation, sample."""
        return self._log_probs(policy) - self._reference

    def _collate(self, pairs: Sequence[PreferencePair]) -> Any:
        """Human continuations, then samples; a label is -100 where the token does not count."""
        texts = [(p.prompt, p.human) for p in pairs] + [(p.prompt, p.sample) for p in pairs]
        tokenize = self._tokenizer
        rows = [[*tokenize(a + b)["input_ids"], tokenize.eos_token_id] for a, b in texts]
        batch = tokenize.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        starts = torch.tensor([[len(tokenize(prompt)["input_ids"])] for prompt, _ in texts])
        mask = batch["attention_mask"]
        left_out = (mask == 0) | (torch.arange(mask.shape[1]) < starts)
        return {**batch, "labels": batch["input_ids"].masked_fill(left_out, -100)}

    @torch.no_grad()
    def _log_probs(self, model: nn.Module) -> Tensor:
        """Summed log-probabilities in nats, in the shape of `log_ratios`."""
        was_training = model.training
        model.eval()
        scores = []
        for batch in self._batches:
            tokens, mask = batch["input_ids"], batch["attention_mask"]
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            scores.append(torch.stack((-nats.view_as(labels).sum(1)).chunk(2), 1))
        model.train(was_training)
        return torch.cat(scores)


class DPOTask:
    """What all runs share; the fine-tuned `reference` is start and reference of every run."""

    def __init__(
        self,
        reference: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        train: Sequence[PreferencePair],
        heldout: Sequence[PreferencePair],
        settings: DemoSettings,
    ) -> None:
        swapped = [pair for pair in train if pair.swapped][: settings.fit_sample]
        clean = [pair for pair in train if not pair.swapped][: settings.fit_sample]
        self.reference = reference
        self.tokenizer = tokenizer
        self.settings = settings
        self.train_rows = [pair.row() for pair in train]
        self.heldout = PairScorer(tokenizer, heldout, reference)
        self.swapped = PairScorer(tokenizer, swapped, reference)
        self.clean = PairScorer(tokenizer, clean, reference)

    def measure(self, policy: nn.Module, step: int) -> tuple[Point, Tensor]:
        """The metrics of a policy, and the ranking scores of the held-out pairs."""
        heldout = self.heldout.log_ratios(policy)
        scores = ranking_scores(heldout)
        # A swapped label is fitted where the sample, the second of the two, is ranked first.
        swapped = ranking_scores(self.swapped.log_ratios(policy).flip(1))
        clean = ranking_scores(self.clean.log_ratios(policy))
        point = Point(
            step=step,
            accuracy=float(scores.double().mean()),
            swapped_fitted=float(swapped.double().mean()),
            clean_fitted=float(clean.double().mean()),
            drift=float((self.settings.beta * heldout.double()).abs().mean()),
        )
        return point, scores


class _Recorder(TrainerCallback):
    """Fills a `RunResult` while its run goes on."""

    def __init__(self, result: RunResult, stopper: PopRiskEarlyStoppingCallback) -> None:
        self.result = result
        self.stopper = stopper
        self.wanted: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        count = _task.settings.evaluations
        self.wanted = {round(state.max_steps * (i + 1) / count) for i in range(count)}
        self._measure(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stops_now = self.stopper.stopping_state["stop_step"] == state.global_step
        if stops_now:
            self.result.stop_step = state.global_step
            self.result.stop_finding = str(self.stopper.diagnosis)
        if stops_now or state.global_step in self.wanted:
            self._measure(kwargs["model"], state.global_step)

    def _measure(self, model: Any, step: int) -> None:
        point, self.result.heldout_scores[step] = _task.measure(model, step)
        self.result.points.append(point)


def _run_dpo(optimizer: str, learning_rate: float, *, seed: int, scratch: str) -> RunResult:
    """Train a copy of the reference to the end and note where the stop would have ended it.

    The stop is that of `criterion="signal"`, which only reads gradients, and the learning rate is
    constant: a run that it ends is the beginning of the run that it does not end. So one run serves
    both arms. (The default, "risk", decides who is trained on when, and anneals in the end.)
    """
    settings = _task.settings
    result = RunResult(optimizer, learning_rate)
    with held_back():
        config = PopRiskDPOConfig(
            output_dir=scratch,
            optim=OPTIMIZERS[optimizer],
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,  # clipping would reweight the steps within a window of the stop
            beta=settings.beta,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=False,
            seed=seed,
            **QUIET_RUN,
        )
        # As PopRiskDPOTrainer makes it of stop_criterion="signal", but for what it decides.
        window: Any = "third"  # of a pass, as the trainer has it
        stopper = PopRiskEarlyStoppingCallback(
            criterion="signal",
            kappa=config.stop_kappa,
            window=window,
            action="monitor",
            restore=None,
        )
        trainer = PopRiskDPOTrainer(
            model=copy.deepcopy(_task.reference),
            args=config,
            train_dataset=Dataset.from_list(_task.train_rows),
            processing_class=_task.tokenizer,
            # In this order: the recorder reads what the stopper decided in the same step.
            callbacks=[stopper, _Recorder(result, stopper), StepProgress(_count_step)],
        )
        trainer.train()
    result.signal_ratio = [{"step": w["step"], "F": w["signal_ratio"]} for w in stopper.history]
    result.stop_armed = stopper.stopping_state["armed"]
    result.stop_reason = stopper.stopping_state["reason"]
    gate = {name.removeprefix("poprisk/"): value for name, value in stopper.metrics().items()}
    result.gate = {name: value for name, value in gate.items() if name in _GATE_STATISTICS}
    return result


def run_all(
    make_task: Callable[[], DPOTask],
    plan: Sequence[tuple[str, float]],
    *,
    seed: int,
    scratch: str,
    on_progress: Callable[[int], None],
) -> list[RunResult]:
    """Run each optimizer and learning rate of `plan`; the same as if one after the other.

    `make_task` can be pickled; it is called once per worker. `on_progress` is called now and then
    with the number of steps done in all runs.
    """
    # Not by fork: a copy of a process with torch's threads may wait for ever for one of them.
    context = multiprocessing.get_context("spawn")
    steps: Synchronized[int] = context.Value("q", 0)
    with ProcessPoolExecutor(
        _WORKERS, mp_context=context, initializer=_start_worker, initargs=(make_task, steps)
    ) as pool:
        futures = [
            pool.submit(_run_dpo, optimizer, rate, seed=seed, scratch=f"{scratch}/run{index}")
            for index, (optimizer, rate) in enumerate(plan)
        ]
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
        return [future.result() for future in futures]


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
