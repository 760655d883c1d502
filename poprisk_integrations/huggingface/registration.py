"""Makes `optim="poprisk_adamw"` a name that transformers knows.

The one file that touches what transformers does not offer for extension. There is no registry
for optimizers: `TrainingArguments.optim` is an enum, and the choices of its command line are that
enum's members. So `register()` changes these things, each once and each leaving everything else
as it was:

| what                                              | why                                          |
|---------------------------------------------------|----------------------------------------------|
| enum `OptimizerNames`: a member per name          | YAML, command line, JSON, pickle, replace    |
| `Trainer.get_optimizer_cls_and_kwargs`: our names | builds the optimizer. Not the handler table  |
|                                                   | of transformers >= 5.2: it is asked after a  |
|                                                   | parser with unreadable errors, and knows no  |
|                                                   | training data (alpha=finite)                 |
| `HfTrainerDeepSpeedConfig.trainer_config_process` | refuses settings under which Trainer would   |
|                                                   | never ask for our optimizer                  |
| `TrainerState.load_from_json`: remembers the path,| callbacks are not told which checkpoint a    |
| and names it if the file is damaged               | run resumes from                             |
| `TrainerState.init_training_references`: what     | callbacks are not told the directory of a    |
| Trainer knows of the run                          | trial, nor the batch size that was found     |
| `CallbackHandler.on_pre_optimizer_step`: the real | the optimizer outlives a change of it        |
| batch size of alpha=finite                        |                                              |
| `CallbackHandler.on_log`: our callbacks' numbers  | trackers (W&B, TensorBoard, ...) are called  |
| enter the line before any callback is called      | before users' callbacks, and no argument of  |
|                                                   | a callback leads to the list of callbacks    |
| `PrinterCallback.on_log`, `ProgressCallback.      | trackers get all our numbers, a console line |
| on_log`: at most three of our numbers             | would be lost in them                        |
| `Trainer._clip_grad_norm` (transformers >= 5.3):  | nobody is told the norm before clipping,     |
| our callbacks get the norm before clipping        | which undoes it                              |

`tests/unit/huggingface/test_registration.py` fails first when transformers moves one of them.
"""

import functools
import inspect
import os
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback
from transformers.training_args import OptimizerNames

from poprisk_integrations.huggingface.optimizer import (
    NAMES,
    OptimizerFactory,
    check_deepspeed_config,
    follow_batch_size,
    optimizer_name,
)
from poprisk_integrations.huggingface.run_callback import add_metrics, for_the_console
from poprisk_integrations.huggingface.run_facts import (
    remember_checkpoint,
    remember_norm,
    remember_run,
)

__all__ = ["register"]

_OWNER = "poprisk_integrations"


def register() -> None:
    """Register `poprisk_adamw`, `poprisk_adamw_8bit` and `poprisk_adamw_paper`, once.

    Importing `poprisk_integrations.huggingface` calls it; further calls change nothing. It
    must happen before the command-line parser and the training arguments are built, and in each
    process that builds them or loads a pickle of them (`training_args.bin`).

    Raises:
        RuntimeError: If one of the names belongs to someone else.
    """
    for name in NAMES:
        _add_enum_member(name)
    trainer: Any = Trainer
    factory = inspect.getattr_static(trainer, "get_optimizer_cls_and_kwargs")
    if not _is_ours(factory):
        trainer.get_optimizer_cls_and_kwargs = OptimizerFactory(
            trainer.get_optimizer_cls_and_kwargs, NAMES
        )
    _replace(HfTrainerDeepSpeedConfig, "trainer_config_process", _checked_config)
    _replace(TrainerState, "load_from_json", _remembering_path)
    _replace(TrainerState, "init_training_references", _remembering_run)
    _replace(CallbackHandler, "on_pre_optimizer_step", _with_real_batch_size)
    _replace(CallbackHandler, "on_log", _with_metrics)
    for printer in (PrinterCallback, ProgressCallback):
        _replace(printer, "on_log", _shortened)
    if hasattr(trainer, "_clip_grad_norm"):
        _replace(trainer, "_clip_grad_norm", _telling_norm)


def _add_enum_member(name: str) -> None:
    existing = OptimizerNames._value2member_map_.get(name)
    if existing is not None:
        if not _is_ours(existing):
            raise RuntimeError(
                f"Cannot register the optimizer name {name!r}: another package has added it to "
                "transformers' OptimizerNames. Import only one of the two."
            )
        return
    # An enum with members cannot be extended by subclassing: this is what its metaclass does.
    member: Any = str.__new__(OptimizerNames, name)
    member._name_ = name.upper()
    member._value_ = name
    member.__objclass__ = OptimizerNames
    member._sort_order_ = len(OptimizerNames._member_names_)
    member.poprisk_owner = _OWNER
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    type.__setattr__(OptimizerNames, member._name_, member)  # Python >= 3.12 looks here


# What stands in for a method gets the original, and the arguments of the call.


def _checked_config(
    original: Any, self: Any, args: TrainingArguments, *rest: Any, **kw: Any
) -> Any:
    if optimizer_name(args) in NAMES:
        check_deepspeed_config(self.config)
    return original(self, args, *rest, **kw)


def _remembering_path(original: Any, cls: type[TrainerState], json_path: str) -> Any:
    try:
        state = original(cls, json_path)
    except (ValueError, TypeError) as error:  # neither says which file
        raise ValueError(
            f"{os.fspath(json_path)!r} is not a whole trainer_state.json ({error}). Resume "
            "from an older checkpoint: last_whole_checkpoint(output_dir) finds one."
        ) from error
    remember_checkpoint(state, json_path)
    return state


def _remembering_run(
    original: Any, self: TrainerState, trainer: Any, max_steps: int, epochs: int, trial: Any
) -> None:
    original(self, trainer, max_steps, epochs, trial)
    remember_run(self, trainer, trial)


def _with_real_batch_size(
    original: Any, self: Any, args: Any, state: TrainerState, *rest: Any, **kw: Any
) -> Any:
    follow_batch_size(args, state, self.optimizer)
    return original(self, args, state, *rest, **kw)


def _with_metrics(
    original: Any, self: Any, args: Any, state: TrainerState, control: Any, logs: Any, **kw: Any
) -> Any:
    add_metrics(self.callbacks, logs, state)
    return original(self, args, state, control, logs, **kw)


def _shortened(
    original: Any, self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any
) -> Any:
    return original(self, args, state, control, logs=for_the_console(logs), **kw)


def _telling_norm(original: Any, self: Any, model: nn.Module) -> Any:
    norm = original(self, model)
    remember_norm(self.state, norm)
    return norm


def _replace(owner: Any, name: str, stand_in: Any) -> None:
    """Have `stand_in(original, ...)` called in the place of a method, once and for all."""
    method = getattr(owner, name)
    original = getattr(method, "__func__", method)  # of a class method
    if _is_ours(original):
        return

    @functools.wraps(original)
    def ours(*args: Any, **kwargs: Any) -> Any:
        return stand_in(original, *args, **kwargs)

    ours.poprisk_owner = _OWNER  # type: ignore[attr-defined]
    setattr(owner, name, ours if original is method else classmethod(ours))


def _is_ours(thing: Any) -> bool:
    return getattr(thing, "poprisk_owner", None) == _OWNER
