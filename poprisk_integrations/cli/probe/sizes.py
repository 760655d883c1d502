"""Sizes of the probed run: what the user said, else what the trainer knows."""

from dataclasses import dataclass

__all__ = ["RunSizes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSizes:
    """Sizes of a run; None for what is not known.

    Attributes:
        batch_size: Examples per optimizer step, over accumulation and ranks.
        dataset_size: Training examples.
        epoch_steps: Optimizer steps of one pass over the data.
        total_steps: Optimizer steps of the whole run.
    """

    batch_size: int | None = None
    dataset_size: int | None = None
    epoch_steps: int | None = None
    total_steps: int | None = None

    def or_else(self, other: "RunSizes") -> "RunSizes":
        """These sizes; those of `other` where they are not known.

        The length of a pass follows from data set and batch where only these were given.

        Example:
            >>> RunSizes(batch_size=8).or_else(RunSizes(batch_size=4, dataset_size=20)).epoch_steps
            3
        """
        batch = self.batch_size or other.batch_size
        data = self.dataset_size or other.dataset_size
        epoch = self.epoch_steps
        if epoch is None and not (self.batch_size or self.dataset_size):
            epoch = other.epoch_steps
        if epoch is None and batch and data:
            epoch = -(-data // batch)
        return RunSizes(
            batch_size=batch,
            dataset_size=data,
            epoch_steps=epoch,
            total_steps=self.total_steps or other.total_steps,
        )
