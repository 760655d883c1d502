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

from poprisk_integrations.huggingface.deepspeed_config import check_deepspeed_config
from poprisk_integrations.huggingface.finite_alpha import follow_batch_size
from poprisk_integrations.huggingface.log_metrics import (
    MetricsCallback,
    add_metrics,
    for_the_console,
)
from poprisk_integrations.huggingface.optimizer import (
    NAMES,
    build_optimizer_spec,
    optimizer_name,
)
from poprisk_integrations.huggingface.run_facts import remember_run
from poprisk_integrations.optim import PopRiskAdamW

__all__ = ["OptimizerFactory", "checkpoint_directory", "register"]

_OWNER = "poprisk_integrations"
_LOADED_FROM = "poprisk_loaded_from"


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
    if not _is_ours(inspect.getattr_static(trainer, "get_optimizer_cls_and_kwargs")):
        trainer.get_optimizer_cls_and_kwargs = OptimizerFactory(
            trainer.get_optimizer_cls_and_kwargs, NAMES
        )
    _replace(HfTrainerDeepSpeedConfig, "trainer_config_process", _checked)
    state: Any = TrainerState
    load = state.load_from_json.__func__
    if not _is_ours(load):
        state.load_from_json = classmethod(_remembering_path(load))
    _replace(state, "init_training_references", _remembering_run)
    _replace(CallbackHandler, "on_pre_optimizer_step", _with_real_batch_size)
    _replace(CallbackHandler, "on_log", _with_metrics)
    for printer in (PrinterCallback, ProgressCallback):
        _replace(printer, "on_log", _shortened)
    if hasattr(trainer, "_clip_grad_norm"):
        _replace(trainer, "_clip_grad_norm", _telling_norm)


def checkpoint_directory(state: TrainerState) -> str | None:
    """Directory of the checkpoint that a run resumes from, wherever it lies; None if from none."""
    return getattr(state, _LOADED_FROM, None)


class OptimizerFactory:
    """Stands in for the static method `Trainer.get_optimizer_cls_and_kwargs`.

    As a descriptor it learns on which trainer it was looked up, and so how many examples there
    are to train on. On the class it works without, as the static method does.

    Under DeepSpeed, Trainer drops the optimizer that it was given and asks for one by name: for
    any name, a PopRiskAdamW that would be lost this way is refused.

    Args:
        original: What answers for all other names.
        names: Values of `args.optim` that this factory answers for.
    """

    def __init__(self, original: Any, names: tuple[str, ...]) -> None:
        _marked(self)
        self._original = original
        self._names = names

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return functools.partial(self._build, trainer)

    def _build(self, trainer: Any, args: TrainingArguments, model: nn.Module | None = None) -> Any:
        _refuse_a_lost_optimizer(trainer, args)
        if optimizer_name(args) not in self._names:
            return self._original(args, model)
        dataset: Any = getattr(trainer, "train_dataset", None)
        num_examples = len(dataset) if hasattr(dataset, "__len__") else None
        accelerator = getattr(trainer, "accelerator", None)
        return build_optimizer_spec(args, model, num_examples, {}, accelerator)


def _refuse_a_lost_optimizer(trainer: Any, args: TrainingArguments) -> None:
    if getattr(args, "deepspeed_plugin", None) is None:
        return
    # By now Trainer has forgotten it; its callbacks have not.
    passed = getattr(getattr(trainer, "callback_handler", None), "optimizer", None)
    if isinstance(passed, PopRiskAdamW):
        raise ValueError(
            "Invalid optimizers: a PopRiskAdamW. Under DeepSpeed, Trainer drops it and would run "
            f"{optimizer_name(args)!r} instead. Leave `optimizers` out, and add to the training "
            'arguments the line "optim": "poprisk_adamw", with its options in "optim_args"'
        )


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
    _marked(member)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    type.__setattr__(OptimizerNames, member._name_, member)  # Python >= 3.12 looks here


def _checked(original: Any) -> Any:
    @functools.wraps(original)
    def trainer_config_process(self: Any, args: TrainingArguments, *rest: Any, **kw: Any) -> Any:
        if optimizer_name(args) in NAMES:
            check_deepspeed_config(self.config)
        return original(self, args, *rest, **kw)

    return trainer_config_process


def _remembering_path(original: Any) -> Any:
    @functools.wraps(original)
    def load_from_json(cls: type[TrainerState], json_path: str) -> Any:
        try:
            state = original(cls, json_path)
        except (ValueError, TypeError) as error:  # neither says which file
            raise ValueError(
                f"{os.fspath(json_path)!r} is not a whole trainer_state.json ({error}). Resume "
                "from an older checkpoint: last_whole_checkpoint(output_dir) finds one."
            ) from error
        # Not a field of the dataclass, so it is never saved.
        setattr(state, _LOADED_FROM, os.path.dirname(os.path.abspath(json_path)))
        return state

    return _marked(load_from_json)


def _remembering_run(original: Any) -> Any:
    @functools.wraps(original)
    def init_training_references(
        self: TrainerState, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any
    ) -> None:
        original(self, trainer, max_steps, num_train_epochs, trial)
        remember_run(self, trainer, trial)

    return init_training_references


def _with_real_batch_size(original: Any) -> Any:
    @functools.wraps(original)
    def on_pre_optimizer_step(
        self: Any, args: Any, state: TrainerState, *rest: Any, **kw: Any
    ) -> Any:
        follow_batch_size(args, state, self.optimizer)
        return original(self, args, state, *rest, **kw)

    return on_pre_optimizer_step


def _with_metrics(original: Any) -> Any:
    @functools.wraps(original)
    def on_log(
        self: Any, args: Any, state: TrainerState, control: Any, logs: Any, **kwargs: Any
    ) -> Any:
        add_metrics(self.callbacks, logs, state)
        return original(self, args, state, control, logs, **kwargs)

    return on_log


def _shortened(original: Any) -> Any:
    @functools.wraps(original)
    def on_log(
        self: Any, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> Any:
        return original(self, args, state, control, logs=for_the_console(logs), **kwargs)

    return on_log


def _telling_norm(original: Any) -> Any:
    @functools.wraps(original)
    def _clip_grad_norm(self: Any, model: nn.Module) -> Any:
        norm = original(self, model)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MetricsCallback):
                callback.grad_norm(norm)
        return norm

    return _clip_grad_norm


def _replace(owner: Any, name: str, wrap: Any) -> None:
    """Put `wrap(method)` in the place of a method, unless that was done before."""
    if not _is_ours(getattr(owner, name)):
        setattr(owner, name, _marked(wrap(getattr(owner, name))))


def _marked(thing: Any) -> Any:
    thing.poprisk_owner = _OWNER
    return thing


def _is_ours(thing: Any) -> bool:
    return getattr(thing, "poprisk_owner", None) == _OWNER
