"""Share of coordinates that the gate lets through, by true per-batch SNR and choice of alpha."""

import argparse
from pathlib import Path

import torch
from benchmarks.harness.figures import legend, plt, save
from benchmarks.harness.provenance import result_name, write_csv

from poprisk_integrations import PopRiskAdamW

TAKES = ()
RULES = {
    "fresh (published, 1)": {"alpha": "fresh"},
    "calibrated 5 %": {"alpha": "calibrated", "false_open_rate": 0.05},
    "calibrated 32 % (default)": {"alpha": "calibrated", "false_open_rate": 0.32},
    "finite, n=60k, b=128": {"alpha": "finite", "batch_size": 128, "dataset_size": 60_000},
    "finite, n=3.84M, b=256": {"alpha": "finite", "batch_size": 256, "dataset_size": 3_840_000},
}
SOURCES = {"moments": "-", "temporal": "--"}  # and their line styles
SNRS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5)


def measure(options: dict, snr: float, coordinates: int, burn_in: int) -> dict[str, float]:
    """Mean statistics of 20 sampled steps, 20 apart, after the burn-in (Gaussian gradients)."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(coordinates))
    optimizer = PopRiskAdamW([param], lr=1e-3, collect_stats_every=1, **options)
    rows = []
    for step in range(burn_in + 400):
        param.grad = snr + torch.randn(coordinates, generator=generator)
        optimizer.step()
        if step >= burn_in and step % 20 == 0:
            rows.append({k: float(v) for k, v in optimizer.gate_stats().items()})
    return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}


def main(args: argparse.Namespace) -> list[str]:
    """Measure, write the CSV, draw."""
    coordinates, burn_in, snrs = (500, 20, SNRS[::4]) if args.quick else (20_000, 300, SNRS)
    rows = []
    cells = [(name, source, snr) for name in RULES for source in SOURCES for snr in snrs]
    for name, source, snr in cells:
        mean = measure({**RULES[name], "noise_source": source}, snr, coordinates, burn_in)
        rows.append(
            {
                "rule": name,
                "noise_source": source,
                "snr": snr,
                "open_fraction": round(mean["open_fraction"], 6),
                "mean_gate_soft": round(mean["mean_gate"], 6),
                "update_norm_ratio": round(mean["update_norm_ratio"], 6),
            }
        )
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw(rows, path.with_suffix(".png"))
    keys = dict.fromkeys((r["rule"], r["noise_source"]) for r in rows)
    at = {k: [r for r in rows if (r["rule"], r["noise_source"]) == k] for k in keys}
    return [f"{', '.join(k)}: {[r['open_fraction'] for r in own]}" for k, own in at.items()]


def draw(rows: list[dict], path: Path) -> None:
    """Open fraction and mean soft gate against SNR, one line per rule."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True, layout="constrained")
    for axis, key, title in (
        (axes[0], "open_fraction", "share of coordinates that are open"),
        (axes[1], "mean_gate_soft", "mean soft gate q (share of Adam's step)"),
    ):
        for place, name in enumerate(RULES):
            for source, style in SOURCES.items():
                line = [r for r in rows if (r["rule"], r["noise_source"]) == (name, source)]
                x, y = ([r[k] for r in line] for k in ("snr", key))
                label = name if source == "moments" else None
                axis.plot(x, y, style, color=f"C{place}", marker="o", ms=3, label=label)
        axis.set(xlabel="true per-batch SNR  |mean| / std of the batch gradient", title=title)
        axis.plot([], [], "k--", label="temporal" if axis is axes[1] else None)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    legend(figure, axes[1], "lower center", ncols=3)
    save(figure, path, dpi=130)
