"""What a gradient window adds to a training step.

`--part sit_out`: what estimating the test loss adds to a run of Trainer or Lightning.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from benchmarks.harness.figures import interval_bar, plt, save
from benchmarks.harness.provenance import hardware, read_csv, write_csv
from benchmarks.harness.timing import block_interval, blocks, llama
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from poprisk_integrations.core import first_epochs
from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.lightning import PopRiskEarlyStopping

TAKES = ("part",)
TARGETS = {"exact": 0.02, "sample": 0.01}
ARMS = [None, *((a, risk) for a in TARGETS for risk in (False, True))]  # None: no window
BLOCKS = 4  # of a window, each with its part of the close
SIT_OUT = {"plain": None, "recording alone": 0.005, "15 % join late": 0.15}
EPOCHS = 4
TARGET = 0.02  # of sitting out


def cnn(quick: bool) -> nn.Module:
    """225,000 parameters, for images of 28 x 28."""
    width = 8 if quick else 32
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def cnn_loss(quick: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Of a batch of 32 images."""
    model = cnn(quick)
    x, y = torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def llama_loss(quick: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Of a batch of 8 x 128 tokens; 4.2 million parameters in 39 tensors."""
    model, x = llama(quick), torch.randint(0, 2048, (8, 16 if quick else 128))
    return model, lambda: model(input_ids=x, labels=x).loss


def measure(name: str, make: Callable, steps: int, rounds: int, quick: bool) -> list[dict]:
    """Windows of all arms, step by step in turn, on one model."""
    torch.manual_seed(0)
    model, loss = make(quick)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    windows = {
        arm: GradientWindow(steps, accumulator=arm[0], measure_risk=arm[1]) for arm in ARMS if arm
    }
    times: dict = {arm: [] for arm in ARMS}  # per step: CPU seconds in the window, and of the rest
    for round_ in range(rounds + 1):  # the first one warms up: buffers, allocator, CPU
        for _ in range(steps if round_ else min(steps, 10)):
            for arm in ARMS:
                start = time.process_time()
                loss().backward()
                before = time.process_time()
                if arm:
                    windows[arm].add(params)
                after = time.process_time()
                optimizer.step()
                optimizer.zero_grad()
                end = time.process_time()
                times[arm].append([after - before, end - start - (after - before)])
        for arm, window in windows.items():
            start = time.process_time()
            closed = window.close()
            per_step = (time.process_time() - start) / steps
            if round_:
                assert closed is not None
                assert closed.steps == steps
            for step in times[arm][-steps:]:
                step[0] += per_step
        if not round_:
            times = {arm: [] for arm in ARMS}

    def share(parts: list) -> float:
        return statistics.median(
            sum(a for a, _ in part) / sum(r for _, r in part) for part in parts
        )

    def ratio(pairs: list) -> float:
        ours, plain = ([sum(step) for pair in pairs for step in pair[k]] for k in (0, 1))
        return statistics.median(ours) / statistics.median(plain)

    rows = []
    size = max(1, steps // BLOCKS)
    for arm in windows:
        parts = blocks(times[arm], size)
        pairs = list(zip(parts, blocks(times[None], size), strict=True))
        low, high = block_interval(parts, share)
        ratio_low, ratio_high = block_interval(pairs, ratio)
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in params),
                "tensors": len(params),
                "accumulator": arm[0],
                "risk": int(arm[1]),
                "share": round(share(parts), 5),
                "share_low": round(low, 5),
                "share_high": round(high, 5),
                "target": TARGETS[arm[0]],
                "step_ratio": round(ratio(pairs), 4),
                "step_ratio_low": round(ratio_low, 4),
                "step_ratio_high": round(ratio_high, 4),
                "window_microseconds": round(1e6 * statistics.mean(a for a, _ in times[arm]), 1),
                "step_milliseconds": round(1e3 * statistics.median(sum(s) for s in times[None]), 2),
                "window": steps,
                "windows": rounds,
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """The share of each arm with its interval, and the target."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, model in zip(axes, ("CNN", "Llama"), strict=True):
        chosen = [r for r in rows if r["model"] == model]
        for i, row in enumerate(chosen):
            interval_bar(axis, i, row, "share", "#c0504d" if int(row["risk"]) else "#e3a9a7")
            target = 100 * float(row["target"])
            axis.plot([i - 0.45, i + 0.45], [target] * 2, color="#1f4e79", lw=2.5)
        names = [f"{r['accumulator']}\n{'all' if int(r['risk']) else 'F only'}" for r in chosen]
        axis.set_xticks(range(len(names)), names)
        milliseconds = float(chosen[0]["step_milliseconds"])
        axis.set_title(f"{model}, step of {milliseconds:.0f} ms", fontsize=10)
    axes[0].set_ylabel("% of a training step")
    axes[0].plot([], [], color="#1f4e79", lw=2.5, label="target")
    axes[0].set_ylim(0, 1.15 * axes[0].get_ylim()[1])
    axes[0].legend(loc="upper right", frameon=False)
    save(figure, path, dpi=130)


class Loss(nn.Module):
    """A classifier that gives its loss, as Trainer wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Module(lightning.LightningModule):
    """The same training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(TrainerCallback, lightning.Callback):
    """CPU seconds of a run, set-up of the callbacks after it included."""

    def on_train_begin(self, *args, **kwargs) -> None:
        self.start = time.process_time()

    on_train_start = on_train_begin

    def on_train_end(self, *args, **kwargs) -> None:
        self.seconds = time.process_time() - self.start


def problem(name: str, steps: int, quick: bool) -> tuple[Callable, list[dict], int]:
    """A model's constructor, data for so many steps per epoch, and the batch size."""
    torch.manual_seed(0)
    if name == "CNN":
        x, y = torch.randn(steps * 32, 1, 28, 28), torch.randint(0, 10, (steps * 32,))
        rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
        return lambda: Loss(cnn(quick)), rows, 32
    x = torch.randint(0, 2048, (steps * 8, 16 if quick else 128))
    return lambda: llama(quick), [{"input_ids": row, "labels": row} for row in x], 8


def seconds(framework: str, model: nn.Module, data: list[dict], size: int, share) -> float:
    """One run."""
    clock = Clock()
    settings = {"criterion": "risk", "sit_out": share, "action": "monitor"}
    if framework == "Trainer":
        stop = [] if share is None else [PopRiskEarlyStoppingCallback(**settings)]
        with tempfile.TemporaryDirectory() as directory:
            args = TrainingArguments(
                directory,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=size,
                learning_rate=1e-4,
                optim="adamw_torch",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            )
            Trainer(model, args, train_dataset=data, callbacks=[clock, *stop]).train()
        return clock.seconds
    stop = [] if share is None else [PopRiskEarlyStopping(**settings)]
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        callbacks=[clock, *stop],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(model), torch.utils.data.DataLoader(data, batch_size=size, shuffle=True))
    return clock.seconds


def saved(examples: int) -> float:
    """Share of the gradients of examples that a run of so many does not make."""
    joins = first_epochs(examples, share=0.15, epochs=EPOCHS)
    return float(joins.sum()) / (examples * EPOCHS)


def sit_out(quick: bool) -> list[dict]:
    """Whole runs of all arms, in turned order each round, after a round that warms up."""
    for name in ("lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = []
    for model, steps, rounds in (("CNN", 50, 12), ("Llama", 10, 3)):
        make, data, size = problem(model, 10 if quick else steps, quick)
        for framework in ("Trainer", "Lightning"):
            runs: list[dict[str, float]] = []
            for round_ in range(2 if quick else rounds + 1):
                order = list(SIT_OUT.items())[:: 1 if round_ % 2 else -1]
                runs.append({a: seconds(framework, make(), data, size, s) for a, s in order})
            runs = runs[1:]
            plain = statistics.median(run["plain"] for run in runs)
            for arm in list(SIT_OUT)[1:]:
                ratios = [run[arm] / run["plain"] for run in runs]
                low, high = block_interval(ratios, statistics.median)
                rows.append(
                    {
                        "framework": framework,
                        "model": model,
                        "arm": arm,
                        "examples": len(data),
                        "epochs": EPOCHS,
                        "gradients_saved": round(saved(len(data)) if "15" in arm else 0.0, 4),
                        "ratio": round(statistics.median(ratios), 4),
                        "ratio_low": round(low, 4),
                        "ratio_high": round(high, 4),
                        "target": 1 + TARGET,
                        "step_milliseconds": round(1e3 * plain / (EPOCHS * len(data) / size), 2),
                        "rounds": len(runs),
                        "threads": torch.get_num_threads(),
                    }
                )
    return rows


PARTS = {"sit_out": sit_out}


def main(args: argparse.Namespace) -> list[str]:
    """Measure, write the CSV, draw."""
    if args.part:
        rows = PARTS[args.part](args.quick)
        write_csv(args.out / f"{args.part}_{hardware()}.csv", rows)
        return [str(row) for row in rows]
    steps = 8 if args.quick else 100
    rows = []
    for name, make, rounds in (("CNN", cnn_loss, 10), ("Llama", llama_loss, 1)):
        rows += measure(name, make, steps, 1 if args.quick else rounds, args.quick)
    path = args.out / f"{hardware()}.csv"
    write_csv(path, rows)
    draw(read_csv(path), path.with_suffix(".png"))
    shown = ("model", "accumulator", "risk", "share", "share_low", "share_high", "step_ratio")
    return [str({key: row[key] for key in shown}) for row in rows]
