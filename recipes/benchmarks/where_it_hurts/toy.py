"""What a toy of this study consists of."""

from collections.abc import Callable
from dataclasses import dataclass

from gate_harness.tasks import Member, Task
from torch import nn

__all__ = ["METRICS", "Toy"]

METRICS = ("accuracy", "loss", "probe")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A task in which the gate was reported to fail.

    Args:
        name: In tables and file names.
        title: In pictures.
        affected: Substrings of the names of the parameters that the report is about.
        module: Makes a model, to read its parameters' names.
        build: Makes the task of some members, with a number of steps.
        steps: Of a full run.
        lrs: Learning rates of every arm.
        seeds: Of a full run.
        group: Members that train side by side.
        jump: The run made the transition where `probe` ends above this; None where there is none.
    """

    name: str
    title: str
    affected: tuple[str, ...]
    module: Callable[[], nn.Module]
    build: Callable[[list[Member], int], Task]
    steps: int
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    group: int
    jump: float | None = None

    @property
    def tensors(self) -> list[str]:
        """Parameter names in the order of a member's row."""
        return [name for name, _ in self.module().named_parameters()]
