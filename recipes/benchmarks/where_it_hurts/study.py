"""Where the gate was reported to fail, and what helps there; see README.md for the rules.

`--arms GATE ...` adds gates, each with all its remedies.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.harness.arms import ARMS, BETAS, CONTROLS, GATES, Arm, control
from benchmarks.harness.figures import legend, percent, plt, save, style_of
from benchmarks.harness.gate_study import Traces
from benchmarks.harness.grid import run_arms
from benchmarks.harness.provenance import hardware, result_name, write_csv
from benchmarks.harness.tables import (
    RANGE,
    Found,
    differences,
    interval,
    member_rows,
    score_rows,
)
from benchmarks.harness.train import Member, Trace, members_of
from benchmarks.where_it_hurts.toys import TOYS, Toy
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor, nn

from poprisk_integrations import PopRiskAdamW

__all__ = ["arm_named", "closed_rows", "summarise", "toy_scores", "verdict", "watched"]

TAKES = ("arms", "seeds", "traces")
HERE = Path(__file__).parent
METRICS = ("accuracy", "loss", "probe")
BARE = ("AdamW", "paper", "snr-fresh", "soft-5", "soft-32", "hard-5", "snr-32")
REMEDIES = ("no_gate", "blend", "warmup")
FULL = (
    *BARE,
    *(f"no_gate({gate})" for gate in BARE[1:]),
    *(f"{kind}({gate})" for kind in ("blend", "warmup", "norm") for gate in BARE[1:4]),
    "norm(snr-32)",
    "only(paper)",
    "only(soft-5)",
    "ratio(soft-5)",
)
QUICK = ("AdamW", "soft-5", "no_gate(soft-5)", "norm(soft-5)")
JUMPS = (*BARE[:5], "snr-32", "no_gate(soft-32)", "no_gate(paper)")
MORE = ("no_gate", "only", "blend", "warmup", "norm", "ratio")  # of a gate that --arms names
WARMUP, BLEND = 100, 0.5  # steps; weight of the gated update
MARGIN = 0.01
MARKS = {"": "o", "no_gate": "s", "blend": "^", "warmup": "v", "norm": "x"}
LABELS = {"": "gate", "norm": "AdamW, step as short"}
# Paths of `closed_rows`. AdamW's with the noise measured along it: q = 1 where there is an update.
PATHS: dict[str, dict[str, Any]] = {
    "AdamW": {"gate": "soft", "alpha": 0.0, "lambda_pop": 0.0},
    "soft-5": {"false_open_rate": 0.05},
}


def main(args: argparse.Namespace) -> list[str]:
    """Train what is missing, write tables and pictures; the verdict."""
    torch.set_num_threads(1)
    toys = list(TOYS)
    if args.quick:
        toys = [replace(t, steps=24, lrs=t.lrs[1:4], seeds=(0, 1), group=6) for t in toys]
    if args.seeds:
        toys = [replace(toy, seeds=tuple(args.seeds)) for toy in toys]
    more = (name for gate in args.arms for name in (gate, *(f"{kind}({gate})" for kind in MORE)))
    names = tuple(dict.fromkeys((*(QUICK if args.quick else FULL), *more)))
    folder = args.out / "traces" if args.quick else args.traces or HERE / "traces"
    traces = {toy.name: _train(toy, names, folder) for toy in toys}
    rows = [
        {"task": toy.name, **row}
        for toy in toys
        for arm, trace in traces[toy.name].items()
        for row in member_rows(arm, trace, METRICS)
    ]
    scores = [row for toy in toys for row in toy_scores(toy, traces[toy.name])]
    summary = summarise(scores)
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw_hurt(toys, traces, summary, path.with_suffix(".png"))
    if not args.quick:
        usual = {row["task"]: float(row["in_place_lr"]) for row in reversed(scores)}
        closed = [r for t in toys for r in closed_rows(t, usual[t.name], t.steps, t.steps // 20)]
        tables = {"scores": scores, "summary": summary, "closed": closed}
        for name, table in tables.items():
            write_csv(args.out / f"{name}_{hardware()}.csv", table)
        draw_jumps([t for t in toys if t.jump], traces, usual, args.out / f"jumps_{hardware()}.png")
    return verdict(summary)


def _train(toy: Toy, names: Sequence[str], folder: Path) -> dict[str, Trace]:
    return run_arms(
        lambda members: toy.build(members, toy.steps),
        [arm_named(name, toy) for name in names],
        members_of(toy.seeds, [""], toy.lrs),
        folder / toy.name,
        group=toy.group,
    )


def arm_named(name: str, toy: Toy) -> Arm:
    """The arm of this name for one model.

    `no_gate(X)`: gate X everywhere but on the affected tensors. `only(X)`: on these alone.
    `blend(X)`: w = 0.5. `warmup(X)`: the first `WARMUP` steps ungated. `norm(X)`, `mask(X)`,
    `ratio(X)`: the harness's controls. Else: an arm of the harness.
    """
    if name in ARMS:
        return ARMS[name]
    match = re.fullmatch(r"(no_gate|only|blend|warmup|norm|mask|ratio)\((.+)\)", name)
    if match is None or match[2] not in GATES:
        raise ValueError(f"Invalid arm: {name!r}. Gates: {list(GATES)}; remedies: {REMEDIES}.")
    kind, gate = match[1], GATES[match[2]]
    if kind in CONTROLS:
        return control(kind, gate.name)
    if kind == "blend":
        return replace(gate, name=name, gate_blend=BLEND)
    if kind == "warmup":
        return replace(gate, name=name, gate_warmup=WARMUP)
    hit = [any(part in tensor for part in toy.affected) for tensor in toy.tensors]
    exempt = tuple(i for i, is_hit in enumerate(hit) if is_hit == (kind == "no_gate"))
    return replace(gate, name=name, exempt=exempt)


def toy_scores(toy: Toy, traces: dict[str, Trace]) -> list[dict]:
    """For each arm and seed: tuned and range scores, and the run at AdamW's tuned rate.

    `in_place` is that run's accuracy, `step_ratio` the mean length of its updates relative to
    AdamW's. `loss`, `probe` and `jump` are of the run at the arm's own tuned rate.
    """

    def member(trace: Trace, seed: int, lr: float) -> int:
        (place,) = np.flatnonzero((trace["seed"] == seed) & np.isclose(trace["lr"], lr))
        return int(place)

    def jump(trace: Trace, place: int) -> int | str:
        return "" if toy.jump is None else int(trace["probe"][-1, place] > toy.jump)

    def end(trace: Trace, place: int) -> float:
        """As in the harness's scores: what diverged or got worse counts as untrained."""
        first, last = trace["accuracy"][[0, -1], place]
        return float(first if trace["diverged"][place] else np.fmax(first, last))

    adamw = traces["AdamW"]
    usual = {
        r["seed"]: float(r["tuned_lr"]) for r in score_rows("AdamW", adamw, "accuracy", higher=True)
    }
    rows = []
    for arm, trace in traces.items():
        for row in score_rows(arm, trace, "accuracy", higher=True):
            own = member(trace, row["seed"], float(row["tuned_lr"]))
            same = member(trace, row["seed"], usual[row["seed"]])
            lengths = [one["update_norm"][:, same].mean() for one in (trace, adamw)]
            rows.append(
                {
                    "task": toy.name,
                    **row,
                    "in_place": f"{end(trace, same):.6g}",
                    "in_place_lr": f"{usual[row['seed']]:g}",
                    "step_ratio": f"{lengths[0] / lengths[1]:.4g}",
                    "loss": f"{trace['loss'][-1, own]:.6g}",
                    "probe": f"{trace['probe'][-1, own]:.6g}",
                    "jump": jump(trace, own),
                    "jump_in_place": jump(trace, same),
                }
            )
    return rows


def judge(found: Found) -> str:
    """Rule 2: broken, unharmed or undecided, by where the interval lies around -1 %."""
    _, low, high = found
    return "broken" if high < -MARGIN else "unharmed" if low > -MARGIN else "undecided"


def summarise(scores: Sequence[dict]) -> list[dict]:
    """One row for each toy and arm: means, differences with intervals, words of the rule."""
    rows = []
    for toy in dict.fromkeys(r["task"] for r in scores):
        mine = [r for r in scores if r["task"] == toy]
        for arm in dict.fromkeys(r["arm"] for r in mine):
            rows.append({"task": toy, "arm": arm, **_summary(mine, arm)})
    return rows


def _summary(scores: Sequence[dict], arm: str) -> dict:
    """Of one arm of one toy."""
    mine = [r for r in scores if r["arm"] == arm]
    row: dict = {}
    for column in ("tuned", "in_place", "range", "loss", "probe", "step_ratio"):
        values = [float(r[column]) for r in mine if r[column] != ""]
        row[column] = f"{sum(values) / len(values):.4f}" if values else ""
    for name, column in (("jumps", "jump"), ("jumps_in_place", "jump_in_place")):
        jumps = [int(r[column]) for r in mine if r["jump"] != ""]
        row[name] = f"{sum(jumps)}/{len(jumps)}" if jumps else ""

    def difference(arm: str, base: str, column: str = "tuned") -> Found:
        return interval(differences(scores, arm, base, column))

    for column in ("tuned", "in_place", "range"):
        found = None
        if all(r[column] != "" for r in mine):
            found = difference(arm, "AdamW", column)
        for place, name in enumerate(("", " low", " high")):
            row[f"{column} vs AdamW{name}"] = f"{found[place]:.5f}" if found else ""
        row[f"{column} verdict"] = judge(found) if found else ""
    kind, _, gate = arm.rstrip(")").partition("(")
    is_remedy = kind in REMEDIES and any(r["arm"] == gate for r in scores)
    row["remedy"] = ""
    if is_remedy and judge(difference(gate, "AdamW")) == "broken":  # rule 3
        helps = difference(arm, gate)[1] > 0
        repairs = judge(difference(arm, "AdamW")) == "unharmed"
        row["remedy"] = "repairs" if repairs else "helps" if helps else "does not help"
    return row


def verdict(summary: Sequence[dict]) -> list[str]:
    """Every bare gate, and the remedies of those that are broken."""
    lines = []
    for row in (r for r in summary if r["arm"] in GATES and r["arm"] != "AdamW"):
        toy, arm = row["task"], row["arm"]
        remedies = [
            f"{kind} {r['remedy']}"
            for kind in REMEDIES
            for r in summary
            if (r["task"], r["arm"]) == (toy, f"{kind}({arm})") and r["remedy"]
        ]
        line = f"{toy}: {arm}"
        for column, name in (("tuned", "tuned"), ("in_place", "at AdamW's rate")):
            mean, low, high = _against_adamw(row, column)
            said = row[f"{column} verdict"]
            line += f" {mean:+.1f} % [{low:+.1f}, {high:+.1f}] {name}: {said};"
        lines.append(line + (f" remedies: {', '.join(remedies)}" if remedies else ""))
    return lines


def _against_adamw(row: dict, column: str) -> list[float]:
    name = f"{column} vs AdamW"
    return percent(row, name, (f"{name} low", f"{name} high"))


def watched(toy: Toy, params: dict[str, nn.Parameter], lr: float, path: str) -> PopRiskAdamW:
    """The optimizer of a path, the affected parameters in the first of two groups."""
    hit = {name: any(part in name for part in toy.affected) for name in params}
    groups = [{"params": [p for n, p in params.items() if hit[n] == is_hit]} for is_hit in (1, 0)]
    options = {"weight_decay": 0.0, "noise_source": "temporal", **PATHS[path]}
    return PopRiskAdamW(groups, lr, collect_stats_every=1, **options)


def is_open(state: dict[str, Tensor], alpha: float, rho: float = 0.99) -> Tensor:
    """Where m_hat^2 > alpha * s_hat, from the optimizer's state after a step."""
    mean = state["exp_avg"] / (1 - BETAS[0] ** float(state["step"]))
    noise = state["exp_dev_sq"] / (1 - rho ** max(1.0, float(state["dev_step"])))
    return mean.square() > alpha * noise


def closed_rows(toy: Toy, lr: float, steps: int, every: int, seed: int = 0) -> list[dict]:
    """Why coordinates are closed: one member, trained with `PopRiskAdamW` itself, rule 6.

    Shares of each group's coordinates along AdamW's path and that of `soft-5`, a row at each
    multiple of `every`. `open` and `closed_*` are at the 5 % boundary. The two reasons are those
    of `gate_stats`: no mean gradient at all, or noise. `closed_no_gradient_now` counts the closed
    coordinates whose gradient at this very step is zero, whatever the reason.
    """
    rows = []
    for path in PATHS:
        task = toy.build([Member(seed=seed, lr=lr)], steps)
        params = {name: nn.Parameter(p.clone()) for name, p in task.initial().items()}
        optimizer = watched(toy, params, lr, path)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            task.losses(params, step - 1).sum().backward()
            optimizer.step()
            if step % every:
                continue
            probe = float(task.metrics({n: p.detach() for n, p in params.items()})["probe"])
            for group, name in zip(optimizer.param_groups, ("affected", "rest"), strict=True):
                shares = _shares(optimizer, group["params"])
                rows.append(
                    {
                        "task": toy.name,
                        "path": path,
                        "lr": f"{lr:g}",
                        "seed": seed,
                        "step": step,
                        "group": name,
                        **{key: f"{value:.4f}" for key, value in shares.items()},
                        "probe": f"{probe:.4f}",
                    }
                )
    return rows


def _shares(optimizer: PopRiskAdamW, params: list[nn.Parameter]) -> dict[str, float]:
    alpha = GATES["soft-5"].alpha
    opened = torch.cat([is_open(optimizer.state[p], alpha).flatten() for p in params])
    mean = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in params])
    grad = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
    dead = ~opened & (mean.square() == 0)
    return {
        "open": opened.float().mean().item(),
        "closed_zero_grad": dead.float().mean().item(),
        "closed_noise": (~opened & ~dead).float().mean().item(),
        "closed_no_gradient_now": (~opened & (grad == 0)).float().mean().item(),
    }


def draw_hurt(toys: Sequence[Toy], traces: Traces, summary: list[dict], path: Path) -> None:
    """Upper row: accuracy at the end against rate. Lower: tuned accuracy relative to AdamW."""
    fig, axes = plt.subplots(2, len(toys), figsize=(4 * len(toys), 8.2), squeeze=False, dpi=120)
    gates = [arm for arm in traces[toys[0].name] if arm in GATES]
    for column, toy in enumerate(toys):
        upper, lower = axes[0][column], axes[1][column]
        for place, arm in enumerate(gates):
            trace, style = traces[toy.name][arm], style_of(place)
            lrs = np.unique(trace["lr"])
            ends = np.stack([trace["accuracy"][-1, trace["lr"] == lr] for lr in lrs])
            mean, error = ends.mean(1), ends.std(1) / max(1, ends.shape[1] - 1) ** 0.5
            upper.plot(lrs, mean, marker=".", label=arm, **style)
            upper.fill_between(
                lrs, mean - error, mean + error, color=style["color"], alpha=0.12, lw=0
            )
        upper.axvspan(min(RANGE), max(RANGE), color="0.93", zorder=0)
        upper.set(xscale="log", xlabel="learning rate", title=toy.title)
        upper.grid(color="0.9")
        _draw_differences(lower, [r for r in summary if r["task"] == toy.name], gates[1:])
        if column:
            lower.set_yticklabels([])
    axes[0][0].set_ylabel("held-out accuracy at the end")
    legend(fig, axes[0][0])
    look = {"color": "0.2", "ls": ""}
    marks = [
        Line2D([], [], marker=m, mfc="w" if kind else "0.2", label=LABELS.get(kind, kind), **look)
        for kind, m in MARKS.items()
    ]
    fig.legend(handles=marks, loc="outside right lower", frameon=False)
    save(fig, path)


def _draw_differences(axis: Axes, summary: list[dict], gates: Sequence[str]) -> None:
    """One line for each gate; its remedies and its control below it."""
    found = {row["arm"]: row for row in summary}
    for line, gate in enumerate(gates):
        for below, kind in enumerate(MARKS):
            row = found.get(f"{kind}({gate})" if kind else gate)
            if row is None:
                continue
            mean, low, high = _against_adamw(row, "tuned")
            y = -line - 0.16 * (below - 2)
            colour = style_of(line + 1)["color"]
            axis.plot([low, high], [y, y], color=colour, lw=1.2)
            axis.plot(mean, y, MARKS[kind], color=colour, ms=5, mfc="w" if kind else colour)
    axis.axvline(0, color="0.2", lw=0.8)
    axis.axvline(-100 * MARGIN, color="0.2", lw=0.8, ls=":")
    axis.set_xscale("symlog", linthresh=2)
    axis.set_xticks([-30, -10, -3, -1, 0, 1], ["-30", "-10", "-3", "-1", "0", "1"])
    axis.minorticks_off()
    axis.set_yticks([-i for i in range(len(gates))], gates)
    axis.set(xlabel="tuned accuracy against AdamW, %", ylim=(0.6 - len(gates), 0.6), xlim=(-60, 2))
    axis.grid(axis="x", color="0.9")


def draw_jumps(toys: Sequence[Toy], traces: Traces, lr: dict[str, float], path: Path) -> None:
    """The probe over training at one rate for each toy, one line for each seed."""
    arms = [arm for arm in JUMPS if arm in traces[toys[0].name]]
    fig, axes = plt.subplots(
        len(toys), len(arms), figsize=(2.4 * len(arms), 2.6 * len(toys)), squeeze=False, dpi=120
    )
    for line, toy in enumerate(toys):
        for column, arm in enumerate(arms):
            axis, trace = axes[line][column], traces[toy.name][arm]
            here = np.isclose(trace["lr"], lr[toy.name])
            axis.plot(trace["eval_step"], trace["probe"][:, here], color="#0072b2", lw=0.9)
            axis.axhline(toy.jump, color="0.2", lw=0.8, ls=":")
            axis.set(ylim=(-0.02, 0.95 if toy.jump > 0.3 else 0.7), title="" if line else arm)
            axis.grid(color="0.9")
            if line == len(toys) - 1:
                axis.set_xlabel("step")
            if column:
                axis.set_yticklabels([])
        axes[line][0].set_ylabel(f"{toy.title}\nprobe, rate {lr[toy.name]:g}")
    save(fig, path)
