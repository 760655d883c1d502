"""axolotl: `plugins: [poprisk_integrations.huggingface.frameworks.axolotl.PopRiskPlugin]`.

axolotl imports its plugins in each process while it loads the configuration, before that is
validated and before training arguments are built: early enough for `optimizer: poprisk_adamw`.
"""

from typing import Any

from poprisk_integrations.huggingface.frameworks._requirement import require_framework
from poprisk_integrations.huggingface.frameworks.stop_options import STOP_OPTIONS, stop_callbacks
from poprisk_integrations.huggingface.registration import register as register_names

require_framework("axolotl", "axolotl")

from axolotl.integrations.base import BasePlugin  # noqa: E402
from pydantic import BaseModel  # noqa: E402  (axolotl's configuration is made of these)

__all__ = ["PopRiskArgs", "PopRiskPlugin"]


class PopRiskArgs(BaseModel):
    """Keys of axolotl's YAML that `PopRiskPlugin` reads, see `stop_options.stop_callbacks`."""

    poprisk_stop: bool | None = None
    poprisk_stop_kappa: float | None = None
    poprisk_stop_window: int | str | None = None
    poprisk_stop_threshold: float | None = None
    poprisk_stop_min_steps: int | None = None
    poprisk_stop_action: str | None = None
    poprisk_stop_restore: str | None = None


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
        """The stop, unless `poprisk_stop: false`.

        Raises:
            ValueError: If an option is not allowed.
        """
        return list(stop_callbacks({name: getattr(cfg, name, None) for name in STOP_OPTIONS}))
