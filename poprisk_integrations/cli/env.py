"""`poprisk env`: versions, devices and what is available, for bug reports."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

__all__ = ["add_parser", "collect", "run"]

_HF = ("transformers", "accelerate", "datasets")
_EXTRAS = {
    "hf": _HF,
    "trl": (*_HF, "trl", "peft"),
    "lightning": ("lightning",),
    "demo": (*_HF, "trl", "peft", "matplotlib", "tokenizers"),
}
_PACKAGES = (
    *("poprisk_integrations", "torch", *_HF, "trl", "peft", "lightning", "pytorch-lightning"),
    *("deepspeed", "triton", "tokenizers", "safetensors", "numpy", "matplotlib", "rich"),
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `env` to the command line."""
    parser = subparsers.add_parser(
        "env",
        help="versions, devices, what is available",
        description="Prints what a bug report needs. Imports no framework but torch.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for section, entries in report.items():
        table.add_row(f"[bold]{section}[/bold]", "")
        for name, value in entries.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(f"  {name}", shown or "none")
    Console(soft_wrap=True).print(table)
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """The report as plain values: sections of name -> value."""
    versions = {name: _version(name) for name in _PACKAGES}
    found = {name for name, version in versions.items() if version is not None}
    if "pytorch-lightning" in found:  # the other name of Lightning, as good
        found.add("lightning")
    return {
        "system": {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
        },
        "packages": {name: version or "not installed" for name, version in versions.items()},
        "extras": {
            extra: [name for name in needed if name not in found] or "available"
            for extra, needed in _EXTRAS.items()
        },
        "devices": _devices(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    backends = ("gloo", "nccl", "mpi") if dist.is_available() else ()
    return {
        "cuda": torch.version.cuda or "not built in",
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "distributed_backends": [b for b in backends if getattr(dist, f"is_{b}_available")()],
    }
