"""Held-out loss of a small Llama with and without gates, trained on Python's own documentation.

`--size 400k|1m|10m` (1m; 400k with --selection), `--device cuda`, `--part checks`: rates outside
the grid. See README.md for the decision rule.
"""

import argparse
import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.figures import draw_rates, legend, plt, save, style_of
from benchmarks.harness.gate_study import GATE_OPTIONS
from benchmarks.harness.grid import join, run_arms
from benchmarks.harness.provenance import hardware, result_name, write_csv
from benchmarks.harness.tables import differences, interval, member_rows, score_rows
from benchmarks.harness.train import Member, Params, Task, Trace, members_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["CHECKS", "SIZES", "LanguageTask", "Size", "split_text", "token_ids", "windows"]

TAKES = (*GATE_OPTIONS, "size", "device", "part")
PARTS = ("checks",)
HERE = Path(__file__).parent
HELD_OUT = 0.1  # of the text, at its end
METRICS = ("held_out_loss", "train_loss")
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
WEIGHT_DECAY = 0.1
WARM_UP = 0.05
LEVEL = 0.005  # smaller differences count as level
REPORTED_SIZE = "1m"  # others go to a folder of their own
REPORTED = ("AdamW", "soft-32", "norm(soft-32)", "ratio(soft-32)", "soft-5", "paper")
CANDIDATES = (
    *("AdamW", "soft-5", "snr-32", "snr-32-norm", "snr-fresh-norm", "soft-32", "soft-5-norm"),
    *("snr-fresh", "hard-32", "snr-5"),
    *(f"soft-32-{option}" for option in ("norm", "decay", "rho999", "warmup", "blend")),
    *("moments-32", "row-32", "tensor-32", "moments-row-32", "moments-tensor-32"),
)
# Is a gain one of a rate between those of the grid, and is 1e-2 an edge? Arm, rate, seeds.
CHECKS = (
    ("AdamW", 1.7e-3, (0, 1, 2)),
    ("soft-32", 1.7e-3, (0,)),
    ("soft-5", 3e-2, (0,)),
    ("paper", 3e-2, (0,)),
)
SHOWN_LR, SMOOTHED = 1e-3, 16  # of the picture of training; steps of a mean


@dataclass(frozen=True, kw_only=True)
class Size:
    """Model and run of a size."""

    hidden: int  # width
    inner: int  # width within the feed-forward block
    layers: int = 3  # blocks
    heads: int = 4  # of attention
    vocabulary: int = 512  # entries of the byte-pair encoding
    length: int = 64  # tokens of a window
    batch_size: int = 8  # windows per step
    steps: int = 384  # of the run
    evaluations: int = 6  # evenly spaced over the run
    rows: int = 1024  # windows that are trained on
    # Of these and of the held-out windows, those that the loss is measured on.
    measured: tuple[int, int] = (32, 128)
    seeds: tuple[int, ...] = (0, 1, 2)  # that are reported
    lrs: tuple[float, ...] = LRS  # learning rates


SIZES = {
    "tiny": Size(
        hidden=16,
        inner=32,
        layers=1,
        heads=2,
        vocabulary=300,
        length=16,
        batch_size=4,
        steps=24,
        evaluations=2,
        rows=32,
        measured=(8, 16),
        seeds=(0, 1),
    ),
    "400k": Size(hidden=96, inner=256),
    "1m": Size(  # one rate more where the arms' best rates lie
        hidden=160, inner=432, seeds=(0, 1, 2, 3, 4), lrs=(3e-4, 1e-3, 1.7e-3, 3e-3, 1e-2)
    ),
    "10m": Size(
        hidden=320,
        inner=864,
        layers=8,
        heads=8,
        vocabulary=1024,
        length=128,
        batch_size=16,
        steps=272,
        evaluations=8,
        rows=1088,
        measured=(64, 112),
    ),
}


def split_text() -> tuple[str, str]:
    """Training part and held-out end of the text, 0.46 MB of English in all."""
    text = "\n".join(pydoc_data.topics.topics.values())
    at = round(len(text) * (1 - HELD_OUT))
    return text[:at], text[at:]


@cache
def token_ids(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Both parts in a byte-level byte-pair encoding that is learned from the training part."""
    train, held_out = split_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([train], trainer)
    return torch.tensor(tokenizer.encode(train).ids), torch.tensor(tokenizer.encode(held_out).ids)


def windows(ids: Tensor, length: int) -> Tensor:
    """Inputs and their successors side by side, shape (N, length + 1); neighbours share a token.

    Each token but the first is predicted once; what does not fill a window is dropped.
    """
    return ids.unfold(0, length + 1, length)


def _spread(rows: Tensor, count: int) -> Tensor:
    """This many windows, evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


class LanguageTask(Task):
    """Next-token prediction; batches without replacement, epoch by epoch.

    Of the members only seeds and rates differ; `attention` is named as in `transformers`.
    """

    def __init__(
        self,
        members: list[Member],
        size: Size,
        *,
        device: str = "cpu",
        attention: str = "sdpa",
    ) -> None:
        self.members, self.size, self.device, self.attention = members, size, device, attention
        self.steps, count = size.steps, size.evaluations
        self.eval_steps = [round(size.steps * k / count) for k in range(1, count + 1)]
        train, held_out = (windows(ids, size.length) for ids in token_ids(size.vocabulary))
        self.train = _spread(train, size.rows).to(device)
        # Whole batches: a mean of their means is the mean.
        self.measured = {
            "train_loss": _spread(self.train, size.measured[0]),
            "held_out_loss": _spread(held_out, size.measured[1]).to(device),
        }
        self.generators = {m.seed: torch.Generator().manual_seed(40_000 + m.seed) for m in members}
        self.order: dict[int, Tensor] = {}
        self.model = self.module(0)

    def module(self, seed: int) -> nn.Module:
        """A fresh model."""
        torch.manual_seed(seed)
        size = self.size
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation=self.attention,
        )
        return LlamaForCausalLM(config).to(self.device)

    def initial(self) -> Params:
        """One draw for each seed."""
        drawn = {
            seed: {name: p.detach() for name, p in self.module(seed).named_parameters()}
            for seed in dict.fromkeys(m.seed for m in self.members)
        }
        names = list(drawn[self.members[0].seed])
        return {n: torch.stack([drawn[m.seed][n] for m in self.members]) for n in names}

    def loss(self, params: Params, rows: Tensor) -> Tensor:
        """Cross-entropy per token, in nats, of one member's parameters on windows (B, L + 1)."""
        logits = functional_call(self.model, params, (), {"input_ids": rows[:, :-1]}).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def batch(self, step: int) -> dict[int, Tensor]:
        """The windows of a step for each seed; a short last batch of an epoch is dropped."""
        count, size = len(self.train), self.size.batch_size
        within = step % (count // size)
        if within == 0:
            self.order = {s: torch.randperm(count, generator=g) for s, g in self.generators.items()}
        rows = slice(within * size, (within + 1) * size)
        return {seed: self.train[order[rows].to(self.device)] for seed, order in self.order.items()}

    def losses(self, params: Params, step: int) -> Tensor:
        """Member by member: models of this size are bound by arithmetic, not by calls."""
        rows = self.batch(step)
        losses = [self.loss(p, rows[m.seed]) for m, p in self._each(params)]
        return torch.stack(losses)

    def metrics(self, params: Params) -> dict[str, Tensor]:
        """Losses on a fixed part of the training text and of the held-out text."""
        found: dict[str, Tensor] = {}
        for name, rows in self.measured.items():
            parts = rows.split(self.size.batch_size)
            means = [
                torch.stack([self.loss(p, x) for x in parts]).mean() for _, p in self._each(params)
            ]
            found[name] = torch.stack(means)
        return found

    def _each(self, params: Params) -> list[tuple[Member, Params]]:
        return [(m, {n: p[i] for n, p in params.items()}) for i, m in enumerate(self.members)]


def main(args: argparse.Namespace) -> list[str]:
    """Train what is missing, write tables and plots arm by arm; the verdict."""
    torch.set_num_threads(1)
    traces_folder = args.out / "traces" if args.quick else args.traces or HERE / "traces"
    if args.part == "checks":
        return _checks(args, traces_folder)
    usual = "tiny" if args.quick else "400k" if args.selection else REPORTED_SIZE
    name = args.size or usual
    if name not in SIZES:
        raise SystemExit(f"Invalid --size: {name!r}. One of {list(SIZES)}.")
    size = SIZES[name]
    arms = args.arms or (CANDIDATES if args.selection else REPORTED)
    seeds = args.seeds or ((100, 101) if args.selection else size.seeds)
    traces: dict[str, Trace] = {}
    for arm in arms:
        folder = traces_folder / name
        traces[arm] = join([train_seed(arm, s, size.lrs, size, args.device, folder) for s in seeds])
        rows, scores = tables(traces, name)
        if args.selection:  # as far as it has come
            write_csv(args.out / f"selection_{hardware()}.csv", rows)
            write_csv(args.out / f"selection_scores_{hardware()}.csv", scores)
    if not args.selection:
        out = args.out if name in ("tiny", REPORTED_SIZE) else args.out / name
        path = out / f"{result_name()}.csv"
        write_csv(path, rows)
        if not args.quick:
            write_csv(out / f"scores_{hardware()}.csv", scores)
            write_csv(out / f"gate_{hardware()}.csv", gate_rows(traces))
            draw_training(traces, out / f"training_{hardware()}.png")
        picture = path.with_suffix(".png")
        draw_rates(traces, METRICS[0], picture, higher=False, label="held-out loss (nats)")
    return verdict(scores)


def _checks(args: argparse.Namespace, traces: Path) -> list[str]:
    rows = []
    for arm, lr, seeds in CHECKS:
        folder = traces / "400k" / f"lr_{lr:g}"
        runs = [train_seed(arm, s, [lr], SIZES["400k"], "cpu", folder) for s in seeds]
        rows += member_rows(arm, join(runs), METRICS)
        write_csv(args.out / f"checks_{hardware()}.csv", rows)
    return [f"{r['arm']}, lr {r['lr']}, seed {r['seed']}: {r['held_out_loss_end']}" for r in rows]


def warm_up(steps: int) -> Callable[[float], float]:
    """From the share of the run that is done to a factor: linear over 5 % of it, then 1."""
    warm = max(1, round(WARM_UP * steps))
    return lambda done: min(1.0, (round(done * steps) + 1) / warm)


def train_seed(
    arm: str, seed: int, lrs: Sequence[float], size: Size, device: str, folder: Path
) -> Trace:
    """All rates of a seed, one model at a time: stacking gains nothing at this size."""
    return run_arms(
        lambda some: LanguageTask(some, size, device=device),
        [arm],
        members_of([seed], [""], lrs, [WEIGHT_DECAY]),
        folder / f"seed_{seed}",
        group=1,
        schedule=warm_up(size.steps),
    )[arm]


def tables(traces: dict[str, Trace], size: str) -> tuple[list[dict], list[dict]]:
    """Rows of members and of scores; training loss at the rates that the held-out loss chose."""
    rows, scores = [], []
    for arm, trace in traces.items():
        rows += [row | {"size": size} for row in member_rows(arm, trace, METRICS)]
        held_out, train = (score_rows(arm, trace, name, higher=False) for name in METRICS)
        for row, other in zip(held_out, train, strict=True):
            here = np.isclose(trace["lr"], float(row["tuned_lr"])) & (trace["seed"] == row["seed"])
            (m,) = np.flatnonzero(here)
            row |= {"train_tuned": f"{trace[METRICS[1]][-1, m]:.6g}", "train_range": other["range"]}
            scores.append(row | {"size": size})
    return rows, scores


def word(mean: float, low: float, high: float) -> str:
    """Point 2 of the decision rule."""
    if low > 0 and mean >= LEVEL:
        return "better"
    return "worse" if high < 0 and mean <= -LEVEL else "level"


def verdict(scores: list[dict]) -> list[str]:
    """The decision rule of the README, a line for each arm and control."""
    arms = list(dict.fromkeys(row["arm"] for row in scores))
    lines = []
    for arm in arms:
        bases = ["AdamW", f"norm({arm})", f"ratio({arm})"]
        for base in (b for b in bases if b in arms and b != arm):
            parts = []
            for column in ("tuned", "range"):
                found = interval(differences(scores, arm, base, column))
                mean, low, high = (100 * x for x in found)
                parts.append(f"{column} {mean:+.2f} % [{low:+.2f}, {high:+.2f}]: {word(*found)}")
            lines.append(f"{arm} against {base}: " + "; ".join(parts))
    return lines


def gate_rows(traces: dict[str, Trace]) -> list[dict]:
    """For each arm and rate, over seeds: open fraction and step length at moments of the run.

    The step length is that of the update in units of the learning rate, relative to AdamW's at
    the same rate, seed and step (1 where AdamW was not run). An open fraction counts coordinates
    that move at all: one for gates that only shrink.
    """
    rows = []
    for arm, trace in traces.items():
        for lr in dict.fromkeys(trace["lr"].tolist()):
            share, length = _curves(traces, arm, lr)
            marks = np.unique(np.linspace(0, len(share) - 1, 7).round().astype(int)[1:])
            row = {"arm": arm, "lr": f"{lr:g}"}
            row |= {f"open_{at + 1}": f"{share[at]:.4f}" for at in marks}
            rows.append(row | {f"length_{at + 1}": f"{length[at]:.4f}" for at in marks})
    return rows


def draw_training(traces: dict[str, Trace], path: Path) -> None:
    """Three panels: training loss, open fraction, step length."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 4), dpi=120)
    for place, (arm, trace) in enumerate(traces.items()):
        style = style_of(place)
        here = np.isclose(trace["lr"], SHOWN_LR)
        axes[0].plot(trace["eval_step"], trace["train_loss"][:, here].mean(1), label=arm, **style)
        for axis, curve in zip(axes[1:], _curves(traces, arm, SHOWN_LR), strict=True):
            axis.plot(np.arange(1, len(curve) + 1), curve, **style)
    titles = ("training loss (nats)", "share of coordinates that move", "step length over AdamW's")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="step", title=title)
        axis.grid(color="0.9")
    axes[2].set_yscale("log")
    fig.suptitle(f"learning rate {SHOWN_LR:g}")
    legend(fig, axes[0])
    save(fig, path)


def _curves(traces: dict[str, Trace], arm: str, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds and the last steps, each of shape (T,)."""
    trace = traces[arm]
    here = np.isclose(trace["lr"], lr)
    base = traces.get("AdamW", trace)
    there = np.isclose(base["lr"], lr) & np.isin(base["seed"], trace["seed"])
    norm, whole = trace["update_norm"][:, here], base["update_norm"][:, there]
    length = norm / whole if base is not trace else np.ones_like(norm)
    return _smooth(trace["moved_share"][:, here].mean(1)), _smooth(length.mean(1))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of this step and up to `SMOOTHED` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values.astype(np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTHED)
    return (sums[ends] - sums[starts]) / (ends - starts)
