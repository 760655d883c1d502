"""axolotl: `plugins: [poprisk_integrations.huggingface.frameworks.axolotl.PopRiskPlugin]`.

axolotl imports its plugins in each process while it loads the configuration, before that is
validated and before training arguments are built: early enough for `optimizer: poprisk_adamw`.
"""

from typing import Any

from poprisk_integrations.huggingface.frameworks import (
    STOP_OPTIONS,
    require_framework,
    stop_callbacks,
)
from poprisk_integrations.huggingface.registration import register as register_names

require_framework("axolotl", "axolotl")

from axolotl.integrations.base import BasePlugin  # noqa: E402
from pydantic import create_model  # noqa: E402  (axolotl's configuration is made of these)

__all__ = ["PopRiskArgs", "PopRiskPlugin"]


# axolotl finds it by the name of its module: keys of its YAML that `PopRiskPlugin` reads.
_KEYS: dict[str, Any] = {name: (hint | None, None) for name, hint in STOP_OPTIONS.items()}
PopRiskArgs = create_model("PopRiskArgs", __module__=__name__, **_KEYS)


class PopRiskPlugin(BasePlugin):  # type: ignore[misc]
    """Makes `optimizer: poprisk_adamw` known to axolotl and adds the stop.

    Options of the optimizer are axolotl's `optim_args`, a mapping or "key=value,key=value".
    """

    def register(self, cfg: Any) -> None:
        """Register the optimizer names; axolotl calls it with the unvalidated configuration."""
        register_names()

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that this plugin adds."""
        return f"{PopRiskArgs.__module__}.{PopRiskArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The stop, unless `poprisk_stop: false`."""
        return list(stop_callbacks({name: getattr(cfg, name, None) for name in STOP_OPTIONS}))
