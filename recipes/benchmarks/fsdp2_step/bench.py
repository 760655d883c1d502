"""Step time under FSDP2 relative to the same local work on plain tensors, paired by round.

Usage: python recipes/benchmarks/fsdp2_step/bench.py [--out DIR] [--quick]
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
from torch import nn

from poprisk_integrations import PopRiskAdamW

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import result_name, write_csv

ARMS = {
    "ours, default": lambda p: PopRiskAdamW(p),
    "ours, foreach": lambda p: PopRiskAdamW(p, foreach=True),
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
}
CASES = {"100 small": 0, "100 small + 8 large": 8}  # number of large parameters
RANKS, WARM_UP = 2, 5


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
    """Time all arms of all cases; rank 0 leaves the ratios."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    order = random.Random(0)  # the same on all ranks: a sharded step is a collective
    ratios: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for case, large in CASES.items():
        optimizers = {}
        for name, make in ARMS.items():
            params = sharded_parameters(large, quick)
            optimizers[name, "sharded"] = make(params)
            optimizers[name, "plain"] = make(plain_copies(params))
        for round_ in range(WARM_UP + (3 if quick else 60)):
            times = {}
            for key in order.sample(list(optimizers), len(optimizers)):
                dist.barrier()
                start, start_cpu = time.perf_counter(), time.process_time()
                optimizers[key].step()
                times[key] = time.perf_counter() - start, time.process_time() - start_cpu
            if round_ >= WARM_UP:
                for name in ARMS:
                    pair = zip(times[name, "sharded"], times[name, "plain"], strict=True)
                    ratio = tuple(sharded / plain for sharded, plain in pair)
                    ratios.setdefault((case, name), []).append(ratio)
    if rank == 0:
        torch.save(ratios, Path(folder, "ratios.pt"))
    dist.destroy_process_group()


def main() -> None:
    """Measure, write the CSV, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="tiny parameters, for tests")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, args.quick), nprocs=RANKS)
        ratios = torch.load(Path(folder, "ratios.pt"))
    rows = []
    for (case, name), pairs in ratios.items():
        values = sorted(wall for wall, _ in pairs)
        rows.append(
            {
                "case": case,
                "arm": name,
                "ratio_median": round(values[len(values) // 2], 3),
                "ratio_p10": round(values[len(values) // 10], 3),
                "ratio_p90": round(values[-1 - len(values) // 10], 3),
                "cpu_ratio_median": round(statistics.median(cpu for _, cpu in pairs), 3),
                "rounds": len(values),
                "ranks": RANKS,
                "threads": 1,
            }
        )
        print(rows[-1], flush=True)
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw(rows, path.with_suffix(".png"))


def draw(rows: list[dict], path: Path) -> None:
    """Median ratio per arm and case with its 10 %-90 % range, and the limit of the rule."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
    for axis, case in zip(axes, CASES, strict=True):
        chosen = [r for r in rows if r["case"] == case][::-1]
        medians = [r["ratio_median"] for r in chosen]
        spread = [
            [m - r["ratio_p10"] for m, r in zip(medians, chosen, strict=True)],
            [r["ratio_p90"] - m for m, r in zip(medians, chosen, strict=True)],
        ]
        names = [r["arm"] for r in chosen]
        colors = ["#c0504d" if n.startswith("ours") else "#7f7f7f" for n in names]
        axis.barh(names, medians, xerr=spread, color=colors, ecolor="#333333", capsize=2)
        axis.axvline(1.0, color="black", lw=0.8, ls=":")
        for y, row in enumerate(chosen):
            axis.text(row["ratio_p90"], y, f"  {row['ratio_median']:.2f}", va="center")
        axis.set_xlim(right=1.2 * max(r["ratio_p90"] for r in chosen))
        axis.set_title(case, fontsize=10)
    axes[1].axvline(1.15, color="black", lw=0.8, ls="--")
    axes[1].text(1.17, -0.45, "1.15", fontsize=8)
    figure.supxlabel("FSDP2 step / same local work on plain tensors, same round", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
