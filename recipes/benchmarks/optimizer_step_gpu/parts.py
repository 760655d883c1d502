"""The parts of `gpu.sh`: python -m benchmarks.optimizer_step_gpu.parts NAME --out DIR [--rehearse].

Each writes NAME_<device>.csv. It ends with 0, with 1 where a check fails, and with 3 where it
cannot run because a package or the device is missing.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from benchmarks.harness.provenance import hardware, write_csv
from benchmarks.optimizer_step_gpu.step import step_rows
from torch import Tensor, nn

from poprisk_integrations import PopRiskAdamW

STEPS = 20
NEEDS = {"stop": ("transformers", "accelerate"), "dpo": ("transformers", "trl", "datasets")}


def _net(device: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.LayerNorm(300), nn.Linear(300, 10))
    return net.to(device)


def _batches(device: str, count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 10, generator=generator)
    xs = [torch.randn(128, 64, generator=generator) for _ in range(count)]
    return [(x.to(device), (x @ weight).to(device)) for x in xs]


def _row(check: str, value: float, limit: float, optimizer: PopRiskAdamW) -> dict:
    passed = value <= limit
    return {
        "check": check,
        "value": value,
        "limit": limit,
        "passed": passed,
        "path": optimizer.path,
    }


def _difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def capture(device: str, rehearse: bool) -> list[dict]:
    """A whole training step as a CUDA graph, replayed on other data, beside the plain steps."""
    rows = []
    for source in ("temporal", "moments"):
        nets = [_net(device) for _ in range(2)]
        optimizers = [PopRiskAdamW(n.parameters(), lr=1e-2, noise_source=source) for n in nets]
        batches = _batches(device)
        with _aside(device):
            for batch in batches[:3]:  # a capture needs states, and kernels that are compiled
                _train(nets[0], optimizers[0], *batch)
        for batch in batches[:3]:
            _train(nets[1], optimizers[1], *batch)
        replay = _captured(nets[0], optimizers[0], [part.clone() for part in batches[0]], device)
        for batch in batches[3:]:
            replay(*batch)
            _train(nets[1], optimizers[1], *batch)
        rows.append(_row(f"replayed, {source}", _difference(*nets), 1e-5, optimizers[0]))
    return rows


def _train(net: nn.Module, optimizer: PopRiskAdamW, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.mse_loss(net(x), y).backward()
    optimizer.step()


@contextlib.contextmanager
def _aside(device: str) -> Iterator[None]:
    """Work on a stream of its own, as torch wants it before a capture."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _captured(
    net: nn.Module, optimizer: PopRiskAdamW, places: list[Tensor], device: str
) -> Callable[[Tensor, Tensor], None]:
    """The training step as a graph that reads `places`; on a CPU the step itself."""
    if device == "cpu":
        return lambda x, y: _train(net, optimizer, x, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _train(net, optimizer, *places)

    def replay(x: Tensor, y: Tensor) -> None:
        for place, value in zip(places, (x, y), strict=True):
            place.copy_(value)
        graph.replay()

    return replay


def scaler(device: str, rehearse: bool) -> list[dict]:
    """float16 autocast with GradScaler, an overflow included, beside the same in float32."""
    rows = []
    for fused in (None, True):
        finals = []
        for scaled in (True, False):
            net = _net(device)
            optimizer = PopRiskAdamW(net.parameters(), lr=3e-3, fused=fused)
            scale = torch.amp.GradScaler(device, init_scale=1024.0, enabled=scaled)
            for number, (x, y) in enumerate(_batches(device, 200)):
                if scaled and number == 5:
                    x = x * float("inf")  # this step must leave no trace
                elif number == 5:
                    continue
                optimizer.zero_grad()
                with torch.autocast(device, torch.float16, enabled=scaled):
                    loss = nn.functional.mse_loss(net(x).float(), y)
                scale.scale(loss).backward()
                scale.step(optimizer)
                scale.update()
            finals.append(float(loss.detach()))
            counts = {float(optimizer.state[p]["step"]) for p in net.parameters()}
            name = f"fused={fused}, {'float16' if scaled else 'float32'}"
            rows.append(
                _row(
                    f"{name}: steps off 199",
                    max(abs(c - 199) for c in counts),
                    0,
                    optimizer,
                )
            )
        gap = abs(finals[0] / finals[1] - 1)
        rows.append(_row(f"fused={fused}: loss against float32's", gap, 0.1, optimizer))
    return rows


def ddp(device: str, rehearse: bool) -> list[dict]:
    """DistributedDataParallel over NCCL with one rank, two passes a step, beside the plain net."""
    rows = []
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        for source in ("temporal", "moments", "microbatch"):
            nets = [_net(device) for _ in range(2)]
            wrapped = [nn.parallel.DistributedDataParallel(nets[0]), nets[1]]
            optimizers = [PopRiskAdamW(n.parameters(), lr=1e-2, noise_source=source) for n in nets]
            for x, y in _batches(device):
                for net, optimizer in zip(wrapped, optimizers, strict=True):
                    optimizer.zero_grad()
                    for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                        (nn.functional.mse_loss(net(a), b) / 2).backward()
                    optimizer.step()
            rows.append(_row(f"{backend}, {source}", _difference(*nets), 1e-5, optimizers[0]))
        torch.distributed.destroy_process_group()
    return rows


def stop(device: str, rehearse: bool) -> list[dict]:
    """The estimate R on a small Llama that memorises, beside the loss on texts it never saw."""
    from benchmarks.harness.timing import llama
    from transformers import Trainer, TrainingArguments

    from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback

    torch.manual_seed(0)
    model = llama(rehearse)
    count, length, epochs = (64, 16, 3) if rehearse else (1600, 64, 4)
    texts = torch.randint(0, 64, (2 * count, length)).cumsum(1) % 2048  # differences are noise
    data = [{"input_ids": row, "labels": row} for row in texts]
    callback = PopRiskEarlyStoppingCallback(criterion="risk", action="monitor")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            optim="poprisk_adamw",
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, args, train_dataset=data[:count], eval_dataset=data[count:], callbacks=[callback]
        )
        trainer.train()
        held_out = trainer.evaluate()["eval_loss"]
    rows = [{**row, "held_out_at_end": round(held_out, 4)} for row in callback.history]
    measured = [row for row in rows if row.get("estimated_test_loss") is not None]
    if not all(math.isfinite(row["estimated_test_loss"]) for row in measured):
        raise SystemExit("an estimate is not finite")
    if not rehearse and not measured:
        raise SystemExit("no window has an estimate")
    return rows or [{"held_out_at_end": round(held_out, 4)}]


def dpo(device: str, rehearse: bool) -> list[dict]:
    """Seconds of a step with trl.DPOTrainer and AdamW, and with PopRiskDPOTrainer's defaults."""
    from benchmarks.dpo_step_cost import study
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer

    hidden, layers, steps, length = (32, 1, 6, 8) if rehearse else (768, 12, 40, 256)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=4 if rehearse else 12,
        max_position_embeddings=2 * length,
    )
    kinds = {
        "trl.DPOTrainer, AdamW": (DPOTrainer, DPOConfig, {"optim": "adamw_torch_fused"}),
        "PopRiskDPOTrainer": (PopRiskDPOTrainer, PopRiskDPOConfig, {"stop_window": 8}),
    }
    rows = []
    for arm, (trainer_class, config_class, options) in kinds.items():
        torch.manual_seed(0)
        prepared = type("Prepared", (study._Prepared, trainer_class), {})
        with tempfile.TemporaryDirectory() as folder:
            args = config_class(
                folder,
                use_cpu=device == "cpu",
                bf16=device == "cuda",
                gradient_checkpointing=False,
                per_device_train_batch_size=4,
                max_steps=steps,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **options,
            )
            trainer = prepared(
                LlamaForCausalLM(config),
                ref_model=LlamaForCausalLM(config),
                args=args,
                train_dataset=study.data(4 * steps, length),
                processing_class=study.tokenizer(),
            )
            began = time.perf_counter()
            trainer.train()
            taken = time.perf_counter() - began
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        if not all(map(math.isfinite, losses)):
            raise SystemExit(f"{arm}: a loss is not finite: {losses}")
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        rows.append(
            {
                "arm": arm,
                "path": getattr(optimizer, "path", ""),
                "seconds_per_step": round(taken / max(1, trainer.state.global_step), 4),
                "steps": trainer.state.global_step,
                "loss": round(median(losses), 4) if losses else "",
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
            }
        )
    return rows


PARTS = {"capture": capture, "scaler": scaler, "ddp": ddp, "stop": stop, "dpo": dpo}


def main() -> int:
    """Run one part, write its table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["step", *PARTS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args()
    missing = [name for name in NEEDS.get(args.part, ()) if importlib.util.find_spec(name) is None]
    if missing or not (args.rehearse or torch.cuda.is_available()):
        print(f"left out: needs {', '.join(missing) or 'a CUDA device'}")
        return 3
    device = "cpu" if args.rehearse else "cuda"
    rows = (step_rows if args.part == "step" else PARTS[args.part])(device, args.rehearse)
    about: dict[str, object] = {"device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "triton": importlib.metadata.version("triton"),
            "toolkit": torch.version.cuda or f"hip {torch.version.hip}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9),
        }
    names = dict.fromkeys(name for row in rows for name in row)
    rows = [{**{name: row.get(name, "") for name in names}, **about} for row in rows]
    write_csv(args.out / f"{args.part}_{hardware()}.csv", rows)
    for row in rows[-6:]:
        print(row)
    return int(not all(row.get("passed", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
