"""The private names of torch, the frameworks and Python that the package uses, each with its why.

`tests/unit/test_private_names.py` checks that they exist and that the list is complete.
"""

import enum
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

__all__ = ["TABLE", "Private"]


@dataclass(frozen=True)
class Private:
    """A private name of someone else's.

    Args:
        name: The name.
        package: Whose; "" for Python itself.
        files: Where we use it.
        why: What for, and why there is no public way.
        exists: Whether it is (still) there.
        since: First version that has it, where we can do without.
    """

    name: str
    package: str
    files: tuple[str, ...]
    why: str
    exists: Callable[[], bool]
    since: str = "0"


def _adamw(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **options)


def _has(module: str, owner: str, name: str) -> Callable[[], bool]:
    """Whether a class or module has an attribute."""
    return lambda: hasattr(getattr(importlib.import_module(module), owner), name)


def _in_source(package: str, path: str, text: str) -> Callable[[], bool]:
    """Whether a source file has a text: for what only instances have, or imports slowly."""

    def look() -> bool:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        return text in (Path(spec.origin).parent / path).read_text()

    return look


def _in_class(module: str, owner: str, text: str) -> Callable[[], bool]:
    """Whether the source of a class has a text."""
    return lambda: text in inspect.getsource(getattr(importlib.import_module(module), owner))


def _ddp_ignores() -> bool:
    layer: Any = torch.nn.Linear(1, 1)
    set_names: Any = torch.nn.parallel.DistributedDataParallel
    set_names._set_params_and_buffers_to_ignore_for_model(layer, ["bias"])
    return list(layer._ddp_params_and_buffers_to_ignore) == ["bias"]


def _dtensor_has_local() -> bool:
    from torch.distributed.tensor import DTensor

    return "_local_tensor" in DTensor.__slots__


def _fsdp_marks() -> bool:
    from torch.distributed.fsdp._common_utils import FSDP_FLATTENED

    return FSDP_FLATTENED == "_fsdp_flattened"


def _offsets_of_shards() -> bool:
    from torch.distributed.tensor import _utils

    names = list(inspect.signature(_utils.compute_local_shape_and_global_offset).parameters)
    return names[:3] == ["global_shape", "mesh", "placements"]


def _scaler_stages() -> bool:
    from torch.amp.grad_scaler import OptState

    scaler = torch.amp.GradScaler("cpu", enabled=True)
    state = scaler._per_optimizer_states[1]
    return bool(state["stage"] is OptState.READY)


def _fused_says_so() -> bool:
    return bool(_adamw(fused=True)._step_supports_amp_scaling)  # type: ignore[attr-defined]


def _lightning(module: str, owner: str, text: str) -> Callable[[], bool]:
    return _in_class(f"lightning.pytorch.{module}", owner, text)


def _foreach(operation: str, *files: str) -> Private:
    name = f"_foreach_{operation}"
    why = "one kernel for many tensors, as torch's own optimizers call it"
    return Private(name, "torch", files, why, lambda: callable(getattr(torch, name)))


def _enum(name: str, exists: Callable[[], bool]) -> Private:
    why = "adds a member to OptimizerNames, which has no way to register one"
    since = "3.11" if name == "_sort_order_" else "0"
    return Private(name, "", ("huggingface/registration.py",), why, exists, since)


def _member_has(name: str) -> Callable[[], bool]:
    kind = enum.Enum("kind", ["A"])
    return lambda: hasattr(kind, name) or hasattr(kind.A, name)


_FOREACH = "optim/_eager.py"
_SUMS = "diagnostics/window_sums.py"

TABLE = (
    # Python
    Private(
        "_exit", "", ("cli/demo/runs.py",),
        "ends a worker whose parent was killed, without the parent's clean-up (documented)",
        lambda: hasattr(importlib.import_module("os"), "_exit"),
    ),
    Private(
        "_actions", "", ("cli/dpo_config.py",), "options of a parser, to name a close one",
        lambda: hasattr(importlib.import_module("argparse").ArgumentParser(), "_actions"),
    ),
    _enum("_name_", _member_has("_name_")),
    _enum("_value_", _member_has("_value_")),
    _enum("_sort_order_", _member_has("_sort_order_")),
    _enum("_member_names_", _member_has("_member_names_")),
    _enum("_member_map_", _member_has("_member_map_")),
    _enum("_value2member_map_", _member_has("_value2member_map_")),
    # torch
    Private(
        "_orig_mod", "torch", ("diagnostics/output_losses.py",),
        "the model inside torch.compile's wrapper",
        lambda: hasattr(torch.compile(torch.nn.Identity(), backend="eager"), "_orig_mod"),
    ),
    Private(
        "_C", "torch", ("diagnostics/example_losses.py", "diagnostics/loss_calls.py"),
        "leads to _nn", lambda: hasattr(torch, "_C"),
    ),
    Private(
        "_nn", "torch", ("diagnostics/example_losses.py", "diagnostics/loss_calls.py"),
        "what torch.nn.functional's losses call, by whichever name the user's code knows them",
        lambda: all(
            hasattr(torch._C._nn, name)
            for name in (
                "cross_entropy_loss", "nll_loss_nd", "binary_cross_entropy", "mse_loss", "l1_loss",
                "smooth_l1_loss", "huber_loss", "soft_margin_loss", "multi_margin_loss",
                "multilabel_margin_loss",
            )
        ),
    ),
    _foreach("add_", _FOREACH, _SUMS, "optim/_scalars.py"),
    _foreach("addcdiv_", _FOREACH),
    _foreach("addcmul_", _FOREACH, _SUMS),
    _foreach("clamp_min_", _FOREACH),
    _foreach("copy_", "diagnostics/window_layout.py", _SUMS, "optim/_fused_math.py"),
    _foreach("div", _FOREACH),
    _foreach("div_", _FOREACH),
    _foreach("lerp_", _FOREACH),
    _foreach("mul", _FOREACH),
    _foreach("mul_", _FOREACH),
    _foreach("neg", _FOREACH),
    _foreach("norm", _SUMS, "huggingface/callbacks/gradients.py", "optim/_work.py"),
    _foreach("sqrt", _FOREACH),
    _foreach("sub", _FOREACH),
    _foreach("zero_", _SUMS, "diagnostics/window_layout.py"),
    Private(
        "_iterator", "torch", ("diagnostics/sit_out_loader.py",),
        "a loader with persistent workers keeps the batch sampler it first had, and its workers",
        lambda: torch.utils.data.DataLoader([0])._iterator is None,
    ),
    Private(
        "_prepare_inputs", "transformers", ("huggingface/callbacks/risk_stop.py",),
        "moves a batch of sitters to the device, and to DeepSpeed's precision, as Trainer does",
        _has("transformers", "Trainer", "_prepare_inputs"),
    ),
    Private(
        "_metrics", "trl", ("huggingface/callbacks/risk_stop.py",),
        "means that TRL's trainers log would count batches of sitters as training batches",
        _in_source("trl", "trainer/sft_trainer.py", "self._metrics"),
    ),
    Private(
        "_local_tensor", "torch",
        ("distributed.py",),
        "a DTensor's shard as it lies in memory; to_local() costs a dispatch and an autograd node",
        _dtensor_has_local,
    ),
    Private(
        "_fsdp_flattened", "torch", ("diagnostics/layer_sample.py", "optim/_pooled.py"),
        "tells FSDP1's shards, plain tensors, from whole parameters", _fsdp_marks,
    ),
    Private(
        "_ddp_params_and_buffers_to_ignore", "torch", ("cli/dpo.py",),
        "boolean buffers that DDP must not broadcast, as TRL's own script sets them", _ddp_ignores,
    ),
    Private(
        "_utils", "torch", ("optim/_rounding.py",),
        "the module of compute_local_shape_and_global_offset: a shard's global index, so that "
        "rounding draws the same bits however a tensor is sharded", _offsets_of_shards,
    ),
    Private(
        "_per_optimizer_states", "torch", ("huggingface/callbacks/gradients.py",),
        "whether a GradScaler has unscaled this optimizer's gradients already", _scaler_stages,
    ),
    *(
        Private(
            name, "torch", ("optim/_noise_source.py", "optim/poprisk_adamw.py"),
            "torch.compiler.disable, as torch.optim itself uses it: it imports Dynamo at the first "
            "call, not with the package", _has("torch", "_compile", "_disable_dynamo"),
        )
        for name in ("_compile", "_disable_dynamo")
    ),
    Private(
        "_step_supports_amp_scaling", "torch",
        ("lightning/_upstream.py", "optim/poprisk_adamw.py"),
        "GradScaler's contract with fused optimizers: they unscale in their step", _fused_says_so,
    ),
    Private(
        "_optimizer_step_pre_hooks", "torch", ("lightning/callbacks/optimizer.py",),
        "whether hooks would be lost when Adam is replaced",
        lambda: hasattr(_adamw(), "_optimizer_step_pre_hooks"),
    ),
    Private(
        "_optimizer_step_post_hooks", "torch", ("lightning/callbacks/optimizer.py",), "as above",
        lambda: hasattr(_adamw(), "_optimizer_step_post_hooks"),
    ),
    # transformers
    Private(
        "_clip_grad_norm", "transformers", ("huggingface/registration.py",),
        "the norm of the gradients before clipping, which undoes it in windows",
        _has("transformers", "Trainer", "_clip_grad_norm"), since="5.3",
    ),
    Private(
        "_get_output_dir", "transformers", ("huggingface/run_facts.py",),
        "the directory of a trial of a hyper-parameter search",
        _has("transformers", "Trainer", "_get_output_dir"),
    ),
    Private(
        "_train_batch_size", "transformers", ("huggingface/run_facts.py",),
        "the batch size that auto_find_batch_size has found",
        _in_class("transformers", "Trainer", "self._train_batch_size"),
    ),
    Private(
        "_internal_call", "transformers", ("trl/pair_trainer.py",),
        "Trainer.save_model's own word for a save that is a checkpoint",
        lambda: "_internal_call"
        in inspect.signature(importlib.import_module("transformers").Trainer.save_model).parameters,
    ),
    # trl
    Private(
        "_set_signature_columns_if_needed", "trl", ("trl/pair_trainer.py",),
        "keeps the pair id and weight, which Trainer would drop from the data set",
        _has("trl", "DPOTrainer", "_set_signature_columns_if_needed"),
    ),
    Private(
        "_signature_columns", "trl", ("trl/pair_trainer.py",), "as above",
        _in_class("trl", "DPOTrainer", "self._signature_columns"),
    ),
    Private(
        "_metrics", "trl", ("trl/_upstream.py",), "numbers that the next log averages",
        _in_class("trl", "DPOTrainer", "self._metrics"),
    ),
    # lightning
    Private(
        "_logger_connector", "lightning", ("lightning/_upstream.py",),
        "whether Lightning logs this step, to log on the same ones; metrics that a search leaves",
        _lightning("trainer.connectors.logger_connector.logger_connector", "_LoggerConnector",
                   "def should_update_logs"),
    ),
    Private(
        "_on_before_batch_transfer", "lightning", ("lightning/_upstream.py",),
        "a module's own hook before a batch is moved: for batches that training does not draw",
        _lightning("core", "LightningModule", "def _on_before_batch_transfer"),
    ),
    Private(
        "_can_stop_early", "lightning", ("lightning/_upstream.py",),
        "whether min_epochs and min_steps are met: should_stop is never taken back",
        _lightning("loops.fit_loop", "_FitLoop", "def _can_stop_early"),
    ),
    Private(
        "_last_global_step_saved", "lightning", ("lightning/_upstream.py",),
        "whether a ModelCheckpoint has saved this step already",
        _lightning("callbacks", "ModelCheckpoint", "self._last_global_step_saved"),
    ),
    Private(
        "_last_checkpoint_saved", "lightning", ("lightning/_upstream.py",), "and where",
        _lightning("callbacks", "ModelCheckpoint", "self._last_checkpoint_saved"),
    ),
    Private(
        "_combined_loader", "lightning", ("lightning/_upstream.py",),
        "the loaders of an epoch with the samplers that Lightning gave them",
        _lightning("loops.fit_loop", "_FitLoop", "self._combined_loader"),
    ),
    Private(
        "_data_source", "lightning", ("lightning/_upstream.py",),
        "the user's loaders, for a second loop over them and for their generators",
        _lightning("loops.fit_loop", "_FitLoop", "self._data_source"),
    ),
    Private(
        "_sampler", "lightning", ("diagnostics/data_pass.py",),
        "the user's sampler, which ranks share",
        _in_class("lightning.fabric.utilities.distributed", "_DatasetSamplerWrapper",
                  "self._sampler ="),
    ),
    # deepspeed
    Private(
        "_global_grad_norm", "deepspeed", ("huggingface/callbacks/deepspeed_gradients.py",),
        "norm before clipping; the engine's public one is that of the step before",
        _in_source("deepspeed", "runtime/zero/stage_1_and_2.py", "self._global_grad_norm ="),
    ),
    Private(
        "_hp_mapping", "deepspeed", ("huggingface/callbacks/deepspeed_gradients.py",),
        "where a parameter's fp32 part lies among this rank's flat tensors",
        _in_source("deepspeed", "utils/mixed_precision_linkage.py", "._hp_mapping ="),
    ),
)  # fmt: skip
