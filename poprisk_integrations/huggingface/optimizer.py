"""PopRiskAdamW from TrainingArguments: built, refused where it would be lost, kept up to date."""

from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from poprisk_integrations.huggingface.optim_args import parse_optim_args
from poprisk_integrations.huggingface.run_facts import global_batch_size, real_batch_size
from poprisk_integrations.optim import PopRiskAdamW, param_groups
from poprisk_integrations.optim._gate_stats import gated_optimizer

__all__ = [
    "NAMES",
    "GateSplitPopRiskAdamW",
    "OptimizerFactory",
    "PopRiskTrainerMixin",
    "check_deepspeed_config",
    "check_training_arguments",
    "follow_batch_size",
    "optimizer_cls_and_kwargs",
    "optimizer_name",
]

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
    return _spec(args, model, optim_args)


def _spec(
    args: TrainingArguments,
    model: nn.Module | None,
    overrides: Mapping[str, Any],
    num_examples: int | None = None,
    accelerator: Any = None,
) -> tuple[type[PopRiskAdamW], dict[str, Any]]:
    """The same for a caller that may know what `alpha="finite"` needs: the data, and the ranks."""
    check_training_arguments(args)
    options = parse_optim_args(args.optim_args, **overrides)
    if optimizer_name(args) == _PAPER:
        options = {**_published_options(), **options}
    if optimizer_name(args) == _8BIT:
        options = {"state_dtype": "8bit", **options}
    if options.get("alpha") == "finite":
        sizes = {"batch_size": global_batch_size(args, accelerator), "dataset_size": num_examples}
        options = {**sizes, **options}
        if options["dataset_size"] is None:
            raise ValueError(
                "Invalid optim_args: alpha=finite needs the number of training examples, which is "
                'not known here. Set optim_args="alpha=finite,dataset_size=N" with that number for '
                "N."
            )
    no_gate = options.pop("no_gate", None)
    betas = (args.adam_beta1, args.adam_beta2)
    kwargs = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, **options}
    if no_gate is None:
        return PopRiskAdamW, kwargs
    if model is None:
        raise ValueError(
            "Invalid optim_args: no_gate needs the model's parameter names, but no model was "
            "given. Pass optimizer_cls_and_kwargs(args, model=model, ...)."
        )
    groups = param_groups(model, no_gate=no_gate)
    ungated = [p for group in groups if group.get("gate") == "none" for p in group["params"]]
    return GateSplitPopRiskAdamW, {**kwargs, "ungated": ungated}


@cache
def _published_options() -> dict[str, Any]:
    """Options in which `PopRiskAdamW.paper` differs from the defaults, read off the class."""
    probe = [nn.Parameter(torch.zeros(0))]
    defaults = PopRiskAdamW(probe).defaults
    paper = PopRiskAdamW.paper(probe).defaults
    return {k: v for k, v in paper.items() if v != defaults[k]}


class GateSplitPopRiskAdamW(PopRiskAdamW):
    """PopRiskAdamW that splits the groups it gets, so that some parameters have no gate.

    Trainer builds its groups (decay or not, one per device mesh) without parameter names and
    knows nothing of gates; splitting what it built keeps all that it decided.
    """

    def __init__(self, params: Iterable[Any], *, ungated: Iterable[Tensor], **options: Any) -> None:
        chosen, groups, split = {id(p) for p in ungated}, list(params), []
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            gated = [p for p in group["params"] if id(p) not in chosen]
            others = [p for p in group["params"] if id(p) in chosen]
            if gated or not others:  # with LoRA, Trainer has a group without parameters
                split.append({**group, "params": gated})
            if others:
                split.append({**group, "params": others, "gate": "none"})
        super().__init__(split, **options)


def optimizer_name(args: TrainingArguments) -> str:
    """The optimizer's name, whether `args.optim` is an enum member or text."""
    return str(getattr(args.optim, "value", args.optim))


def check_training_arguments(args: TrainingArguments) -> None:
    """Raise if DeepSpeed would replace the optimizer (see `check_deepspeed_config`)."""
    plugin: Any = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        check_deepspeed_config(plugin.hf_ds_config.config)


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed config that would replace the optimizer, and name the line to change.

    DeepSpeed 0.19 itself fails with errors that do not say why (KeyError 'amsgrad', a TypeError
    about None), except for "zenflow" at stage 3, which goes ahead.
    """
    zero = config.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    how = ""
    if "optimizer" in config:  # DeepSpeed builds its own, and Trainer's is never created
        how = (
            'its "optimizer" section would replace PopRiskAdamW. Delete that section and add the '
            'line "zero_allow_untested_optimizer": true'
        )
    elif zero.get("zenflow") is not None:
        how = (
            "with zenflow, an AdamW of DeepSpeed's would replace PopRiskAdamW for the columns with "
            'the largest gradients. Set the line "zenflow": null in "zero_optimization"'
        )
    elif offload.get("device", "none") in ("none", "auto"):
        return  # the launcher fills in "auto", and what it fills in is looked at again
    elif config.get("zero_force_ds_cpu_optimizer", True):  # accelerate puts it there
        how = (
            "with offload_optimizer, DeepSpeedCPUAdam would replace PopRiskAdamW. Add the line "
            '"zero_force_ds_cpu_optimizer": false'
        )
    elif offload.get("super_offload"):  # another process steps it
        how = (
            "with super_offload, DeepSpeedCPUAdam would replace PopRiskAdamW. Set the line "
            '"super_offload": false in "offload_optimizer"'
        )
    if how:
        raise ValueError(f"Invalid DeepSpeed config: {how}")


class OptimizerFactory:
    """Stands in for the static method `Trainer.get_optimizer_cls_and_kwargs`.

    As a descriptor it learns on which trainer it was looked up, and so how many examples there
    are to train on. On the class it works without, as the static method does.

    Under DeepSpeed, Trainer drops the optimizer that it was given and asks for one by name: for
    any name, a PopRiskAdamW that would be lost this way is refused. `names` are the values of
    `args.optim` that this factory answers for, `original` answers for all others.
    """

    poprisk_owner = "poprisk_integrations"  # how `registration` knows what it has put in place

    def __init__(self, original: Any, names: tuple[str, ...]) -> None:
        self._original = original
        self._names = names

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return partial(self._build, trainer)

    def _build(self, trainer: Any, args: TrainingArguments, model: nn.Module | None = None) -> Any:
        # By now Trainer has forgotten what it was given; its callbacks have not.
        passed = getattr(getattr(trainer, "callback_handler", None), "optimizer", None)
        is_deepspeed = getattr(args, "deepspeed_plugin", None) is not None
        if is_deepspeed and isinstance(passed, PopRiskAdamW):
            raise ValueError(
                "Invalid optimizers: a PopRiskAdamW. Under DeepSpeed, Trainer drops it and would "
                f"run {optimizer_name(args)!r} instead. Leave `optimizers` out, and add to the "
                'training arguments the line "optim": "poprisk_adamw", with its options in '
                '"optim_args"'
            )
        if optimizer_name(args) not in self._names:
            return self._original(args, model)
        dataset: Any = getattr(trainer, "train_dataset", None)
        num_examples = len(dataset) if hasattr(dataset, "__len__") else None
        return _spec(args, model, {}, num_examples, getattr(trainer, "accelerator", None))


_ADAMW_NAMES = ("adamw_torch", "adamw_torch_fused")


def _refuse(args: Any, model: Any = None) -> Any:
    raise ValueError(
        f"Invalid optim: {optimizer_name(args)!r}. PopRiskTrainerMixin puts PopRiskAdamW in the "
        f"place of AdamW only: use one of {(*_ADAMW_NAMES, *NAMES)}, or leave the mixin out."
    )


class PopRiskTrainerMixin:
    """Mixin for `transformers.Trainer` and its subclasses: PopRiskAdamW instead of AdamW.

        class MyTrainer(PopRiskTrainerMixin, SFTTrainer): ...

    Overrides the optimizer factory: `optim="adamw_torch"` and `"adamw_torch_fused"` (Trainer's
    default) give PopRiskAdamW with the options in `args.optim_args`; any other optimizer is
    refused. An optimizer or `optimizer_cls_and_kwargs` passed to the trainer is kept, where
    Trainer keeps it (under DeepSpeed it drops `optimizers`).

    Raises:
        ValueError: If DeepSpeed would replace the optimizer.
    """

    get_optimizer_cls_and_kwargs = OptimizerFactory(_refuse, (*NAMES, *_ADAMW_NAMES))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With an "optimizer" section in its config, DeepSpeed never asks for ours.
        check_training_arguments(self.args)  # type: ignore[attr-defined]


# No fields, so never saved: on the run's state the accumulation that was last looked at, on the
# optimizer the batch size that its groups were last given.
_FOLLOWED = "poprisk_followed"


def follow_batch_size(args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
    """Before a step: correct a batch size that came from Trainer and is no longer its own."""
    # The optimizer outlives an attempt of `auto_find_batch_size`, a checkpoint brings the size of
    # its own run along, and a callback may change the accumulation.
    optimizer = gated_optimizer(optimizer)
    if optimizer is None:
        return
    accumulation = args.gradient_accumulation_steps
    now = real_batch_size(args, state)
    if now is None or state.__dict__.get(_FOLLOWED) == accumulation:
        return
    # A size that the user gave stays. Options of another optimizer's name are not ours to parse.
    is_named = optimizer_name(args) in NAMES and "batch_size" not in parse_optim_args(
        args.optim_args
    )
    before = optimizer.__dict__.get(_FOLLOWED, global_batch_size(args))
    for group in optimizer.param_groups:
        if group["alpha"] == "finite" and (is_named or group["batch_size"] == before):
            group["batch_size"] = now
    state.__dict__[_FOLLOWED] = accumulation
    optimizer.__dict__[_FOLLOWED] = now
