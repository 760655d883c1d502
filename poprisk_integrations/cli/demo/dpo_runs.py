"""One DPO run: its trajectory, and where the stop would have ended it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from poprisk_integrations.cli.demo.metrics import drift, ranking_scores, share
from poprisk_integrations.cli.demo.pair_scores import PairScorer
from poprisk_integrations.cli.demo.preference_pairs import PreferencePair, to_rows
from poprisk_integrations.cli.demo.progress import StepProgress
from poprisk_integrations.cli.demo.settings import DemoSettings
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from poprisk_integrations.trl.early_stopping import auto_window

__all__ = ["OPTIMIZERS", "DPOTask", "Point", "RunResult", "run_dpo"]

# Name in the results -> TrainingArguments.optim.
OPTIMIZERS = {"AdamW": "adamw_torch", "PopRiskAdamW": "poprisk_adamw"}

_GATE_STATISTICS = ("open_fraction", "mean_gate", "update_norm_ratio")


@dataclass(frozen=True, slots=True)
class Point:
    """The metrics after `step` optimizer steps.

    Attributes:
        step: Optimizer steps.
        accuracy: Share of held-out pairs with the human continuation ranked first.
        swapped_fitted: Share of (a sample of) the swapped training pairs ranked as their wrong
            label says.
        clean_fitted: Share of (a sample of) the other training pairs ranked as labelled.
        drift: Mean absolute reward over the held-out continuations.
    """

    step: int
    accuracy: float
    swapped_fitted: float
    clean_fitted: float
    drift: float


@dataclass(slots=True)
class RunResult:
    """A run of `optimizer` at `learning_rate`.

    Attributes:
        points: The trajectory, from step 0 to the end.
        windows: (step, F) of every window of the stopping statistic.
        stop_step: Where the stop would have ended the run; None if nowhere.
        stop_reason: The stop's own words.
        stop_finding: What the windows said at the stop; "" if there was none.
        armed: Whether the stop ever saw signal enough to be armed.
        gate: Gate statistics of the last sampled step; empty without a gate.
        heldout_scores: Step -> ranking scores of the held-out pairs, at the stop and at the end.
    """

    optimizer: str
    learning_rate: float
    points: list[Point] = field(default_factory=list)
    windows: list[tuple[int, float]] = field(default_factory=list)
    stop_step: int | None = None
    stop_reason: str = ""
    stop_finding: str = ""
    armed: bool = False
    gate: dict[str, float] = field(default_factory=dict)
    heldout_scores: dict[int, Tensor] = field(default_factory=dict)

    def point_at(self, step: int) -> Point:
        """The point of that step."""
        return next(point for point in self.points if point.step == step)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the per-pair scores."""
        return {
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "stop_step": self.stop_step,
            "stop_reason": self.stop_reason,
            "stop_finding": self.stop_finding,
            "stop_armed": self.armed,
            "signal_ratio": [{"step": step, "F": ratio} for step, ratio in self.windows],
            "gate": self.gate,
            "points": [asdict(point) for point in self.points],
        }


class DPOTask:
    """What all runs share: the reference, the training pairs, and the pairs to score.

    Args:
        reference: Fine-tuned model; start and reference of every run.
        tokenizer: Its tokenizer.
        train: Training pairs, labels swapped.
        heldout: Held-out pairs.
        settings: Settings of the demo.
    """

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
        self.train_rows = to_rows(train)
        self.heldout = PairScorer(tokenizer, heldout, reference)
        self.swapped = PairScorer(tokenizer, swapped, reference)
        self.clean = PairScorer(tokenizer, clean, reference)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-len(self.train_rows) // self.settings.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one run."""
        return self.epoch_steps * self.settings.epochs

    def measure(self, policy: torch.nn.Module, step: int) -> tuple[Point, Tensor]:
        """The metrics of a policy, and the ranking scores of the held-out pairs."""
        heldout = self.heldout.log_ratios(policy)
        scores = ranking_scores(heldout)
        swapped = ranking_scores(self.swapped.log_ratios(policy), prefer_sample=True)
        clean = ranking_scores(self.clean.log_ratios(policy))
        point = Point(
            step=step,
            accuracy=share(scores),
            swapped_fitted=share(swapped),
            clean_fitted=share(clean),
            drift=drift(heldout, self.settings.beta),
        )
        return point, scores


def run_dpo(
    task: DPOTask,
    optimizer: str,
    learning_rate: float,
    *,
    seed: int,
    scratch: str,
    on_step: Callable[[int], None] | None = None,
) -> RunResult:
    """Train a copy of the reference to the end and note where the stop would have ended it.

    The stop only reads gradients, and the learning rate is constant: a run that it ends is the
    beginning of the run that it does not end. So one run serves both arms.

    Args:
        task: Data and reference.
        optimizer: A key of `OPTIMIZERS`.
        learning_rate: Constant over the run.
        seed: Of the order of the pairs; the same for all runs that are compared.
        scratch: A directory for Trainer.
        on_step: Called with the number of steps done.
    """
    settings = task.settings
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
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    # As PopRiskDPOTrainer would make it, but for what it does with its decision.
    window = auto_window(
        len(task.train_rows), per_device=settings.batch_size, accumulation=1, world_size=1
    )
    stopper = PopRiskEarlyStoppingCallback(
        config.stop_kappa, window, action="monitor", restore=None
    )
    result = RunResult(optimizer, learning_rate)
    model = copy.deepcopy(task.reference)
    trainer = PopRiskDPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(task.train_rows),
        processing_class=task.tokenizer,
        # In this order: the recorder reads what the stopper decided in the same step.
        callbacks=[stopper, _Recorder(task, result, stopper), StepProgress(on_step)],
    )
    trainer.train()
    result.armed = stopper.stopping_state["armed"]
    result.stop_reason = stopper.stopping_state["reason"]
    result.gate = {
        name.removeprefix("poprisk/"): value
        for name, value in stopper.metrics().items()
        if name.removeprefix("poprisk/") in _GATE_STATISTICS
    }
    return result


class _Recorder(TrainerCallback):
    """Fills a `RunResult` while its run goes on."""

    def __init__(
        self, task: DPOTask, result: RunResult, stopper: PopRiskEarlyStoppingCallback
    ) -> None:
        self.task = task
        self.result = result
        self.stopper = stopper
        self.wanted: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        count = self.task.settings.evaluations
        self.wanted = {round(state.max_steps * (i + 1) / count) for i in range(count)}
        self._measure(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stopping = self.stopper.stopping_state
        if stopping["windows"] > len(self.result.windows):
            self.result.windows.append((state.global_step, stopping["signal_ratio"]))
        stops_now = stopping["stop_step"] == state.global_step
        if stops_now:
            self.result.stop_step = state.global_step
            self.result.stop_finding = str(self.stopper.diagnosis)
        if stops_now or state.global_step in self.wanted:
            scores = self._measure(kwargs["model"], state.global_step)
            if stops_now or state.global_step == state.max_steps:
                self.result.heldout_scores[state.global_step] = scores

    def _measure(self, model: Any, step: int) -> Tensor:
        point, scores = self.task.measure(model, step)
        self.result.points.append(point)
        return scores
