"""What PopRiskDPOTrainer adds to a training step of trl.DPOTrainer."""

import argparse
import contextlib
import io
import random
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
import trl
from benchmarks.harness.figures import plt, save
from benchmarks.harness.provenance import hardware, read_csv, write_csv
from benchmarks.harness.timing import block_interval, blocks
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from poprisk_integrations.cli.builtin import local_model
from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer

TAKES = ()
TARGET = 1.05
OURS = {"optim": "adamw_torch", "stop": False}
KNOWN, STOP = {"noise_rate": 0.3}, {"stop": True, "stop_window": 8}
# Options of each arm; the first is what the others are compared with.
PLAIN = "trl.DPOTrainer, AdamW"
ARMS = {
    PLAIN: {"optim": "adamw_torch"},
    "noise off": {**OURS, "noise": "off"},
    "rdpo": {**OURS, **KNOWN, "noise": "rdpo"},
    "weights": {**OURS, **KNOWN, "noise": "weights"},
    "rdpo, stop": {**OURS, **KNOWN, **STOP, "noise": "rdpo"},
    "all defaults": {**KNOWN, "stop_window": 8},
}


class Turns(TrainerCallback):
    """Lets trainers take one step each in turn, and measures the CPU time of every step.

    Each trainer runs its own loop in a thread of its own and waits at the end of a step until it is
    its turn again: at any time one of them computes. A step reaches from there to the end of the
    next one: data, loss, gradients, optimizer, callbacks, log.
    """

    turn = threading.Condition()
    order: ClassVar[list[int]] = []  # of the places whose turn is still to come in this round
    draw = random.Random(0)

    def __init__(self, place: int, count: int) -> None:
        self.place, self.count = place, count
        self.times: list[float] = []
        self.began = 0.0

    @classmethod
    def new_round(cls, count: int) -> None:
        """Another order each time: what ran before decides what a step finds in the caches."""
        cls.order = cls.draw.sample(range(count), count)

    def wait(self) -> None:
        with self.turn:
            self.turn.wait_for(lambda: Turns.order[:1] == [self.place])
        self.began = time.process_time()

    def pass_on(self) -> None:
        with self.turn:
            Turns.order.pop(0)
            if not Turns.order:
                self.new_round(self.count)
            self.turn.notify_all()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time() - self.began)
        self.pass_on()
        self.wait()


def model(quick: bool) -> LlamaForCausalLM:
    """9 million parameters: the smallest that has the shape of a real one."""
    torch.manual_seed(0)
    hidden, layers = (32, 1) if quick else (256, 6)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=hidden * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    )


def data(count: int, length: int) -> Dataset:
    """Random tokens: what they say does not change what a step costs."""
    rng = random.Random(0)
    sizes = {"prompt_ids": length // 2, "chosen_ids": length, "rejected_ids": length}
    return Dataset.from_list(
        [
            {name: [rng.randrange(3, 4096) for _ in range(size)] for name, size in sizes.items()}
            for _ in range(count)
        ]
    )


def tokenizer() -> Any:
    """Any will do, for its special tokens."""
    with tempfile.TemporaryDirectory() as folder:
        return AutoTokenizer.from_pretrained(local_model("builtin:tiny-llama", Path(folder)))


class _Prepared:
    """Mixin: the data are tokenized already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def trainer_of(arm: str, turns: Turns, steps: int, folder: str, quick: bool) -> DPOTrainer:
    """A trainer that takes turns with the others."""
    plain = arm == PLAIN
    trainer_class = DPOTrainer if plain else PopRiskDPOTrainer
    config_class = DPOConfig if plain else PopRiskDPOConfig
    prepared: Any = type("Prepared", (_Prepared, trainer_class), {})
    return prepared(
        model(quick),
        ref_model=model(quick),
        args=config_class(
            output_dir=f"{folder}/{turns.place}",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=4,
            max_steps=steps,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **ARMS[arm],
        ),
        train_dataset=data(4 * steps, 8 if quick else 48),
        processing_class=tokenizer(),
        callbacks=[turns],
    )


def step_times(steps: int, quick: bool) -> dict[str, list[float]]:
    """CPU seconds of each step of each arm; steps of the same number are neighbours in time."""
    arms = {arm: Turns(place, len(ARMS)) for place, arm in enumerate(ARMS)}
    Turns.new_round(len(ARMS))
    with tempfile.TemporaryDirectory() as folder:

        def train(trainer: DPOTrainer, turns: Turns) -> None:
            turns.wait()
            trainer.train()
            turns.pass_on()

        threads = [
            threading.Thread(
                target=train, args=(trainer_of(arm, turns, steps, folder, quick), turns)
            )
            for arm, turns in arms.items()
        ]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return {arm: turns.times for arm, turns in arms.items()}


def measure(steps: int, warm_up: int, quick: bool) -> list[dict]:
    """All arms side by side."""
    times = {arm: found[warm_up:] for arm, found in step_times(steps + warm_up, quick).items()}
    plain = times[PLAIN]

    def middle(parts: list) -> float:
        return statistics.median(ratio for part in parts for ratio in part)

    rows = []
    for arm in list(ARMS)[1:]:
        ratios = [a / b for a, b in zip(times[arm], plain, strict=True)]
        low, high = block_interval(blocks(ratios, 4), middle, draws=2000)
        rows.append(
            {
                "arm": arm,
                "ratio": round(statistics.median(ratios), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "mean_ratio": round(sum(times[arm]) / sum(plain), 4),
                "target": TARGET,
                "step_milliseconds": round(1e3 * statistics.median(plain), 2),
                "parameters": sum(p.numel() for p in model(quick).parameters()),
                "steps": steps,
                "trl": trl.__version__,
            }
        )
    return rows


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Ratio of each arm with its interval, and the target."""
    figure, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
    for place, row in enumerate(rows):
        ratio, low, high = (float(row[key]) for key in ("ratio", "low", "high"))
        axis.errorbar(
            ratio, place, xerr=[[ratio - low], [high - ratio]], fmt="o", color="#c0504d", capsize=3
        )
        axis.annotate(
            f"{ratio:.3f}", (ratio, place), xytext=(0, 6), textcoords="offset points", ha="center"
        )
    axis.axvline(1.0, color="#999999", lw=1)
    axis.axvline(TARGET, color="#1f4e79", lw=2, label=f"target {TARGET}")
    axis.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.8)
    axis.set_xlabel("CPU time of a step over that of trl.DPOTrainer with AdamW")
    axis.legend(frameon=False, loc="lower right")
    save(figure, path, dpi=130)


def main(args: argparse.Namespace) -> list[str]:
    """Measure, write the CSV, draw."""
    warnings.simplefilter("ignore", FutureWarning)  # transformers deprecates a name TRL still uses
    torch.set_num_threads(1)
    steps, warm_up = (8, 2) if args.quick else (48, 4)
    path = args.out / f"{hardware()}.csv"
    write_csv(path, measure(steps, warm_up, args.quick))
    rows = read_csv(path)
    draw(rows, path.with_suffix(".png"))
    return [f"{r['arm']}: {r['ratio']} [{r['low']}, {r['high']}]" for r in rows]
