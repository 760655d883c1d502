"""Step time under FSDP2 relative to the same local work on plain tensors, paired by round."""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from benchmarks.harness.figures import plt, save
from benchmarks.harness.provenance import result_name, write_csv
from benchmarks.harness.timing import ratio_row, shuffled
from torch import nn

from poprisk_integrations import PopRiskAdamW

TAKES = ()
ARMS = {
    "ours, default": lambda p: PopRiskAdamW(p),
    "ours, foreach": lambda p: PopRiskAdamW(p, foreach=True),
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
}
CASES = {"100 small": 0, "100 small + 8 large": 8}  # number of large parameters
RANKS, WARM_UP, TARGET = 2, 5, 1.15


def sharded_parameters(large: int, quick: bool) -> list[nn.Parameter]:
    """DTensor parameters with gradients, sharded over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    widths = [16] * 10 + [32] * large if quick else [64] * 100 + [1024] * large
    model = nn.Sequential(*(nn.Linear(n, n, bias=False) for n in widths))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    for param in model.parameters():
        grad = torch.randn_like(param.to_local()) * 1e-3
        param.grad = DTensor.from_local(grad, param.device_mesh, param.placements)
    return list(model.parameters())


def plain_copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """This rank's shards as parameters of their own."""
    copies = []
    for param in params:
        copy = nn.Parameter(param.detach().to_local().clone())
        copy.grad = param.grad.to_local().clone()
        copies.append(copy)
    return copies


def measure(rank: int, folder: str, quick: bool) -> None:
    """Time all arms of all cases; rank 0 leaves the ratios of wall and of CPU times."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    ratios = []
    for case, large in CASES.items():
        optimizers = {}
        for name, make in ARMS.items():
            params = sharded_parameters(large, quick)
            optimizers[name, "sharded"] = make(params)
            optimizers[name, "plain"] = make(plain_copies(params))
        # The same orders on all ranks: a sharded step is a collective.
        orders = shuffled(list(optimizers), WARM_UP + (3 if quick else 60))
        found: dict[str, list[list[float]]] = {name: [] for name in ARMS}
        for order in orders:
            times = {}
            for key in order:
                dist.barrier()
                start, start_cpu = time.perf_counter(), time.process_time()
                optimizers[key].step()
                times[key] = time.perf_counter() - start, time.process_time() - start_cpu
            for name, rows in found.items():
                pairs = zip(times[name, "sharded"], times[name, "plain"], strict=True)
                rows.append([sharded / plain for sharded, plain in pairs])
        ratios += [(case, name, rows[WARM_UP:]) for name, rows in found.items()]
    if rank == 0:
        Path(folder, "ratios.json").write_text(json.dumps(ratios))
    dist.destroy_process_group()


def main(args: argparse.Namespace) -> list[str]:
    """Measure, write the CSV, draw."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, args.quick), nprocs=RANKS)
        ratios = json.loads(Path(folder, "ratios.json").read_text())
    rows = []
    for case, name, pairs in ratios:
        wall, cpu = zip(*pairs, strict=True)
        rows.append(
            {
                "case": case,
                "arm": name,
                **ratio_row(wall, name="ratio_median"),
                "cpu_ratio_median": round(statistics.median(cpu), 3),
                "rounds": len(pairs),
                "ranks": RANKS,
                "threads": 1,
            }
        )
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw(rows, path.with_suffix(".png"))
    return [f"{r['case']}, {r['arm']}: {r['ratio_median']}" for r in rows]


def draw(rows: list[dict], path: Path) -> None:
    """Median ratio per arm and case with its 10 %-90 % range, and the limit of the rule."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
    for axis, case in zip(axes, CASES, strict=True):
        chosen = [r for r in reversed(rows) if r["case"] == case]
        for y, row in enumerate(chosen):
            ratio, low, high = (row[k] for k in ("ratio_median", "ratio_p10", "ratio_p90"))
            axis.barh(
                row["arm"],
                ratio,
                xerr=[[ratio - low], [high - ratio]],
                color="#c0504d" if row["arm"].startswith("ours") else "#7f7f7f",
                ecolor="#333333",
                capsize=2,
            )
            axis.text(high, y, f"  {ratio:.2f}", va="center")
        axis.axvline(1.0, color="black", lw=0.8, ls=":")
        axis.set_xlim(right=1.2 * max(r["ratio_p90"] for r in chosen))
        axis.set_title(case, fontsize=10)
    axes[1].axvline(TARGET, color="black", lw=0.8, ls="--")
    axes[1].text(TARGET + 0.02, -0.45, f"{TARGET}", fontsize=8)
    figure.supxlabel("FSDP2 step / same local work on plain tensors, same round", fontsize=9)
    save(figure, path, dpi=130)
