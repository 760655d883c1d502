"""What the monitor adds to a training step."""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.harness.figures import interval_bar, plt, save
from benchmarks.harness.provenance import read_csv, result_name, write_csv
from benchmarks.harness.timing import block_interval, blocks, llama, seconds
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.huggingface import PopRiskMonitorCallback
from poprisk_integrations.lightning import PopRiskMonitor

TAKES = ()
TARGET = 0.01
EVERY = 50  # steps between samples, and between log lines
ARMS = {"none": None, "totals": {}, "per layer": {"per_layer": True}}


class Clock:
    """CPU and wall seconds of each step, and those inside the monitor's hooks."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.inside: list[float] = []
        self.in_step = 0.0  # of a sampled optimizer step, beyond one that is not sampled
        self._last: tuple[float, float] | None = None
        self._inside = 0.0

    def tick(self) -> None:
        now = time.process_time(), time.perf_counter()
        if self._last is not None:
            self.steps.append((now[0] - self._last[0], now[1] - self._last[1]))
            self.inside.append(self._inside)
        self._last, self._inside = now, 0.0

    def watch(self, owner: object, *names: str) -> None:
        """Have the time that methods of a callback take counted."""
        for name in names:
            method = getattr(owner, name)

            def timed(*args, method=method, **kwargs):
                start = time.process_time()
                try:
                    return method(*args, **kwargs)
                finally:
                    self._inside += time.process_time() - start

            setattr(owner, name, timed)


def sampling_in_step(optimizer: torch.optim.Optimizer) -> float:
    """Median CPU seconds that a sampled optimizer step takes more, in pairs."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    differences = []
    for _ in range(12):
        taken = []
        for every in (0, 1):
            for group in optimizer.param_groups:
                group["collect_stats_every"] = every
            taken.append(seconds(optimizer.step, time.process_time))
        differences.append(taken[1] - taken[0])
    return statistics.median(differences)


def llama_by_trainer(options: dict | None, steps: int, quick: bool) -> Clock:
    """A batch of 8 x 128 tokens."""
    torch.manual_seed(0)
    model = llama(quick)
    ids = torch.randint(0, 2048, (8 * (steps + 1), 16 if quick else 128))
    clock = Clock()

    class Tick(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.tick()

    callbacks: list = [Tick()]
    if options is not None:
        callbacks.append(PopRiskMonitorCallback(EVERY, **options))
        clock.watch(callbacks[-1], "on_pre_optimizer_step", "on_optimizer_step", "metrics")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=8,
            max_steps=steps + 1,
            logging_steps=EVERY,
            optim="poprisk_adamw",
            optim_args="fused=false",
            learning_rate=1e-4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=False,
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if options is not None:
            clock.in_step = sampling_in_step(trainer.optimizer.optimizer)
    return clock


def mlp_by_lightning(options: dict | None, steps: int, quick: bool) -> Clock:
    """A 784-512-512-10 perceptron, a batch of 128; a CSV logger."""
    width = 32 if quick else 512

    class Perceptron(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.Linear(width, 10))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return PopRiskAdamW(self.parameters(), lr=1e-4, fused=False)

    clock = Clock()

    class Tick(Callback):
        def on_train_batch_start(self, *args):
            clock.tick()

    callbacks: list = [Tick()]
    if options is not None:
        callbacks.append(PopRiskMonitor(EVERY, **options))
        clock.watch(callbacks[-1], "on_before_optimizer_step", "on_train_batch_end")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128 * (steps + 1), 784, generator=generator)
    data = TensorDataset(x, torch.randint(0, 10, (len(x),), generator=generator))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers
        trainer = LightningTrainer(
            accelerator="cpu",
            devices=1,
            logger=CSVLogger(folder),
            log_every_n_steps=EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
            callbacks=callbacks,
        )
        trainer.fit(Perceptron(), DataLoader(data, batch_size=128))
        if options is not None:
            clock.in_step = sampling_in_step(trainer.optimizers[0])
    return clock


def measure(name: str, fit: Callable, steps: int, rounds: int, quick: bool) -> list[dict]:
    """Runs of all arms in turn, in another order each round; the first round warms up."""
    runs: dict[str, list[Clock]] = {arm: [] for arm in ARMS}
    for round_ in range(rounds + 1):
        order = list(ARMS) if round_ % 2 else list(ARMS)[::-1]
        for arm in order:
            runs[arm].append(fit(ARMS[arm], steps if round_ else 5, quick))
    plain = runs["none"][1:]
    rows = []
    for arm in list(ARMS)[1:]:
        pairs = list(zip(runs[arm][1:], plain, strict=True))

        def ratio(pairs, which):
            """Of means: a median of steps would not see one step in 50."""
            ours, theirs = ([s[which] for pair in pairs for s in pair[k].steps] for k in (0, 1))
            return statistics.fmean(ours) / statistics.fmean(theirs)

        in_step = statistics.median(clock.in_step for clock, _ in pairs)
        parts = [
            (in_step + sum(inside), sum(cpu for cpu, _ in steps))
            for clock, _ in pairs
            for inside, steps in zip(
                blocks(clock.inside, EVERY), blocks(clock.steps, EVERY), strict=True
            )
        ]

        def share(parts):
            return statistics.median(a / (whole - a) for a, whole in parts)

        row = {"task": name, "monitor": arm, "share": share(parts)}
        row["share_low"], row["share_high"] = block_interval(parts, share)
        for which, clock_name in ((0, "cpu"), (1, "wall")):
            low, high = block_interval(pairs, lambda p, which=which: ratio(p, which))
            row[f"{clock_name}_ratio"] = ratio(pairs, which)
            row[f"{clock_name}_ratio_low"], row[f"{clock_name}_ratio_high"] = low, high
        inside = sum(sum(clock.inside) for clock, _ in pairs)
        count = sum(len(clock.steps) for clock, _ in pairs)
        row["hooks_microseconds"] = 1e6 * inside / count
        row["in_step_microseconds"] = 1e6 * in_step / EVERY
        row["step_milliseconds"] = 1e3 * statistics.median(s[0] for c in plain for s in c.steps)
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        row |= {"target": TARGET, "every": EVERY, "steps": count, "rounds": rounds}
        row["threads"] = torch.get_num_threads()
        rows.append(row)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """The share of each arm with its interval, and the target."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for place, row in enumerate(rows):
        colour = "#c0504d" if row["monitor"] == "per layer" else "#e3a9a7"
        interval_bar(axis, place, row, "share", colour)
    axis.axhline(100 * TARGET, color="#1f4e79", lw=2.5, label="target")
    axis.set_xticks(range(len(rows)), [f"{r['task']}\n{r['monitor']}" for r in rows])
    axis.set_ylabel("% of a training step")
    axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    axis.legend(frameon=False)
    save(figure, path, dpi=130)


def main(args: argparse.Namespace) -> list[str]:
    """Measure, write the CSV, draw."""
    plan = (("MLP", mlp_by_lightning, 200, 4), ("Llama", llama_by_trainer, 50, 2))
    rows = []
    for name, fit, steps, rounds in plan:
        length = EVERY if args.quick else steps
        rows += measure(name, fit, length, 1 if args.quick else rounds, args.quick)
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    rows = read_csv(path)
    draw(rows, path.with_suffix(".png"))
    return [f"{r['task']}, {r['monitor']}: {float(r['share']):.2%} of a step" for r in rows]
