"""PopRiskAdamW from TrainingArguments."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from poprisk_integrations.huggingface.deepspeed_config import check_deepspeed_config
from poprisk_integrations.huggingface.global_batch import global_batch_size
from poprisk_integrations.huggingface.optim_args import parse_optim_args
from poprisk_integrations.optim import PopRiskAdamW, param_groups

__all__ = ["NAMES", "GateSplitPopRiskAdamW", "optimizer_cls_and_kwargs"]

_8BIT = "poprisk_adamw_8bit"
_PAPER = "poprisk_adamw_paper"
NAMES = ("poprisk_adamw", _8BIT, _PAPER)


def optimizer_cls_and_kwargs(
    args: TrainingArguments, model: nn.Module | None = None, **optim_args: Any
) -> tuple[type[PopRiskAdamW], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes; needs no registered name.

    lr, betas and eps come from `args`; weight decay comes from Trainer's groups. Trainer clips
    gradients by their global norm before the optimizer sees them (`max_grad_norm`, 1.0 by
    default): the gate then measures the noise of clipped gradients, which understates it while
    clipping is active.

    Args:
        args: Training arguments. `args.optim_args` counts, whatever `args.optim` is;
            `optim="poprisk_adamw_paper"` gives the published settings, `"poprisk_adamw_8bit"`
            8-bit states (experimental).
        model: Only for `no_gate`: the model that the Trainer gets.
        **optim_args: Options of PopRiskAdamW that win over `args.optim_args`, and `no_gate`
            ("embed|norm" or a list), which switches the gate off for parameters whose name
            contains one of the parts. `alpha="finite"` takes the global batch size from `args`
            and needs `dataset_size` here; with a registered name it takes both from the Trainer.

    Returns:
        Optimizer class and its keyword arguments.

    Raises:
        ValueError: For invalid options, `no_gate` that matches nothing, an unknown data set size,
            or a DeepSpeed config that would replace the optimizer.

    Example:
        >>> args = TrainingArguments(output_dir="out", learning_rate=1e-4, use_cpu=True)
        >>> cls, kwargs = optimizer_cls_and_kwargs(args, gate="hard")
        >>> cls.__name__, kwargs["lr"], kwargs["gate"]
        ('PopRiskAdamW', 0.0001, 'hard')
    """
    return build_optimizer_spec(args, model, None, optim_args)


def build_optimizer_spec(
    args: TrainingArguments,
    model: nn.Module | None,
    num_examples: int | None,
    overrides: Mapping[str, Any],
    accelerator: Any = None,
) -> tuple[type[PopRiskAdamW], dict[str, Any]]:
    """`optimizer_cls_and_kwargs` for callers that may know the data.

    Args:
        args: Training arguments.
        model: The model, for `no_gate`.
        num_examples: Number of training examples, for `alpha="finite"`; None if unknown.
        overrides: Options that win over `args.optim_args`.
        accelerator: The Trainer's, for `alpha="finite"`; None if unknown.
    """
    check_training_arguments(args)
    options = parse_optim_args(args.optim_args, **overrides)
    if optimizer_name(args) == _PAPER:
        options = {**_published_options(), **options}
    if optimizer_name(args) == _8BIT:
        options = {"state_dtype": "8bit", **options}
    if options.get("alpha") == "finite":
        options = _with_sizes(options, global_batch_size(args, accelerator), num_examples)
    no_gate = options.pop("no_gate", None)
    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **options,
    }
    if no_gate is None:
        return PopRiskAdamW, kwargs
    if model is None:
        raise ValueError(
            "Invalid optim_args: no_gate needs the model's parameter names, but no model was "
            "given. Pass optimizer_cls_and_kwargs(args, model=model, ...)."
        )
    return GateSplitPopRiskAdamW, {**kwargs, "ungated": _ungated_parameters(model, no_gate)}


class GateSplitPopRiskAdamW(PopRiskAdamW):
    """PopRiskAdamW that splits the groups it gets, so that some parameters have no gate.

    Trainer builds its groups (decay or not, one per device mesh) without parameter names and
    knows nothing of gates; splitting what it built keeps all that it decided.

    Args:
        params: Parameter groups.
        ungated: Parameters whose groups get `gate="none"`.
        **options: As for PopRiskAdamW.
    """

    def __init__(self, params: Iterable[Any], *, ungated: Iterable[Tensor], **options: Any) -> None:
        chosen = {id(p) for p in ungated}
        super().__init__(_split_by_gate(list(params), chosen), **options)


def optimizer_name(args: TrainingArguments) -> str:
    """The optimizer's name, whether `args.optim` is an enum member or text."""
    return str(getattr(args.optim, "value", args.optim))


def check_training_arguments(args: TrainingArguments) -> None:
    """Raise if DeepSpeed would replace the optimizer (see `check_deepspeed_config`)."""
    plugin: Any = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        check_deepspeed_config(plugin.hf_ds_config.config)


def _with_sizes(
    options: dict[str, Any], batch_size: int, num_examples: int | None
) -> dict[str, Any]:
    sizes = {"batch_size": batch_size, "dataset_size": num_examples, **options}
    if sizes["dataset_size"] is None:
        raise ValueError(
            "Invalid optim_args: alpha=finite needs the number of training examples, which is not "
            'known here. Set optim_args="alpha=finite,dataset_size=N" with that number for N.'
        )
    return sizes


@cache
def _published_options() -> dict[str, Any]:
    """Options in which `PopRiskAdamW.paper` differs from the defaults, read off the class."""
    probe = [nn.Parameter(torch.zeros(0))]
    defaults = PopRiskAdamW(probe).defaults
    paper = PopRiskAdamW.paper(probe).defaults
    return {k: v for k, v in paper.items() if v != defaults[k]}


def _ungated_parameters(model: nn.Module, patterns: tuple[str, ...]) -> list[Tensor]:
    groups = param_groups(model, no_gate=patterns)
    return [p for group in groups if group.get("gate") == "none" for p in group["params"]]


def _split_by_gate(groups: list[Any], ungated: set[int]) -> list[dict[str, Any]]:
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    split = []
    for group in groups:
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for param in group["params"]:
            parts[id(param) in ungated].append(param)
        if parts[0] or not parts[1]:
            split.append({**group, "params": parts[0]})
        if parts[1]:
            split.append({**group, "params": parts[1], "gate": "none"})
    return split
