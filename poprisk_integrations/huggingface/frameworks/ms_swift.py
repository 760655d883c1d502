"""ms-swift: `--external_plugins` with a file that imports this module.

It adds to ms-swift's registries. Version 4: the optimizer names to `optimizers_map` and
`poprisk_stop` to `callbacks_map`. Version 3: the names to `optimizers_map`, and the stop to
`extra_callbacks`, which all runs get.

Plugins are imported while ms-swift's arguments are built: too late for `--optim`, whose choices are
listed by then. Hence `--optimizer poprisk_adamw`. There is no place for arguments of a plugin
either: the stop takes its options from the environment, as in `POPRISK_STOP_KAPPA=3`.
"""

import os
from importlib.util import find_spec
from typing import Any

from transformers.training_args import OptimizerNames

from poprisk_integrations.huggingface.frameworks import (
    STOP_OPTIONS,
    require_framework,
    stop_callbacks,
)
from poprisk_integrations.huggingface.optimizer import NAMES, check_training_arguments
from poprisk_integrations.huggingface.registration import register

require_framework("swift", "ms-swift")

__all__ = ["STOP_NAME", "options_from_environment", "stop_from_environment"]

STOP_NAME = "poprisk_stop"


def options_from_environment() -> dict[str, str]:
    """The stop's options from variables of their names in capitals.

    Example:
        >>> options_from_environment()
        {}
    """
    return {n: os.environ[n.upper()] for n in STOP_OPTIONS if n.upper() in os.environ}


def stop_from_environment(args: Any, trainer: Any) -> Any:
    """What ms-swift 4 calls for `--callbacks poprisk_stop`."""
    callbacks = stop_callbacks(options_from_environment())
    if not callbacks:
        raise ValueError(
            f"Invalid POPRISK_STOP: {os.environ['POPRISK_STOP']!r}. Leave {STOP_NAME} out of "
            "--callbacks instead."
        )
    return callbacks[0]


def _choose(args: Any, name: str) -> None:
    """Have Trainer build our optimizer, or say why it would not."""
    args.optim = OptimizerNames(name)
    check_training_arguments(args)


def _add_to_version_4() -> None:
    from swift.callbacks import callbacks_map
    from swift.optimizers import OptimizerCallback, optimizers_map

    class PopRiskOptimizer(OptimizerCallback):  # type: ignore[misc]
        """Trainer's own way to an optimizer, with our name in its arguments."""

        name: str

        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(args, trainer)
            _choose(args, self.name)

    for name in NAMES:
        optimizers_map[name] = type("PopRiskOptimizer", (PopRiskOptimizer,), {"name": name})
    callbacks_map[STOP_NAME] = stop_from_environment


def _add_to_version_3() -> None:
    from swift.plugin import extra_callbacks, optimizers_map

    def creator(name: str) -> Any:
        def create(args: Any, model: Any, dataset: Any) -> tuple[None, None]:
            _choose(args, name)
            return None, None  # then Trainer creates optimizer and scheduler

        return create

    for name in NAMES:
        optimizers_map[name] = creator(name)
    extra_callbacks.extend(stop_callbacks(options_from_environment()))


register()
if find_spec("swift.optimizers") is not None:
    _add_to_version_4()
else:
    _add_to_version_3()
