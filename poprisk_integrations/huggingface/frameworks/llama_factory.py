"""LLaMA-Factory: `python -m poprisk_integrations.huggingface.frameworks.llama_factory train.yaml`.

LLaMA-Factory has no plugins, but a function that trains and takes callbacks. This module takes the
place of `llamafactory-cli train`: it registers the optimizer names, takes the keys `poprisk_...`
out of the configuration, and calls that function. Under a launcher: `torchrun --nproc-per-node 8
-m poprisk_integrations.huggingface.frameworks.llama_factory train.yaml`.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from poprisk_integrations.huggingface.frameworks import require_framework, stop_callbacks
from poprisk_integrations.huggingface.registration import register

require_framework("llamafactory", "llamafactory")

__all__ = ["main", "split_options"]

_PREFIX = "poprisk_"


def split_options(args: Mapping[str, Any] | Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """LLaMA-Factory's part of a configuration, and ours; `--key value` cannot hold a key of ours.

    Example:
        >>> split_options({"stage": "dpo", "poprisk_stop_kappa": 3})
        ({'stage': 'dpo'}, {'poprisk_stop_kappa': 3})
    """
    if not isinstance(args, Mapping):
        for argument in args:
            if argument.lstrip("-").startswith(_PREFIX):
                raise ValueError(
                    f"Invalid argument {argument!r}: give it as a key of the YAML or JSON file, or "
                    "as key=value after the file."
                )
        return list(args), {}
    ours = {name: value for name, value in args.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in args.items() if name not in ours}, ours


def main() -> None:
    """Train as `llamafactory-cli train` does, with the optimizer names known and the stop added."""
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    if len(sys.argv) < 2:
        raise SystemExit("a configuration is missing: CONFIG.yaml [key=value ...]")
    args, options = split_options(read_args())
    register()
    run_exp(args=args, callbacks=list(stop_callbacks(options)))


if __name__ == "__main__":
    main()
