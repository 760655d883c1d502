"""The training pairs with their ids and weights, numbered so that each is known again later."""

import logging
import math
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from poprisk_integrations.trl.flip_report import FlipReport, suggested_actions
from poprisk_integrations.trl.label_noise import LabelNoise
from poprisk_integrations.trl.pair_checks import check_weights, pair_ids
from poprisk_integrations.trl.pair_columns import ROW_COLUMN, add_pair_columns, source_rows
from poprisk_integrations.trl.pair_texts import excerpts

if TYPE_CHECKING:
    from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig

__all__ = ["LabelledPairs", "flip_report"]

logger = logging.getLogger(__name__)

SHOWN = 20  # pairs of a report that have a few words of their texts


class LabelledPairs:
    """Ids, weights and row numbers of the pairs, from before TRL filters and shards them.

    Args:
        args: Settings of the run.
        dataset: Training pairs; without a length (streamed) they have neither ids nor weights.

    Raises:
        ValueError: If ids or weights are none, or are asked for where the data are streamed.

    Attributes:
        dataset: The data to train on, with the columns of `add_pair_columns`.
    """

    def __init__(self, args: "PopRiskDPOConfig", dataset: Any) -> None:
        self._dropped: set[int] = set()
        self._ids: list[int] | list[str] = []
        self._rows: list[int] = []
        self.dataset = dataset
        if not isinstance(dataset, Dataset):
            if dataset is not None:
                _refuse_streamed(args)
            return
        self._rows = source_rows(dataset)
        column = args.pair_id_column
        self._ids = self._rows if column is None else pair_ids(dataset, column)
        column = args.pair_weight_column
        weights = None if column is None else check_weights(dataset, column)
        self.dataset = add_pair_columns(dataset, weights)

    def __len__(self) -> int:
        """Rows before any was dropped; 0 for streamed data."""
        return len(self._ids)

    def note_dropped(self, prepared: Any) -> None:
        """Compare with what TRL made of the data, and say how many pairs are missing.

        Args:
            prepared: The trainer's `train_dataset`.
        """
        if not len(self) or not isinstance(prepared, Dataset):
            return
        self._dropped = set(range(len(self))) - set(prepared.with_format(None)[ROW_COLUMN])
        if self._dropped:
            logger.warning(
                "%d of %d training pairs were dropped: their prompts alone fill max_length.",
                len(self._dropped),
                len(self),
            )

    def flip_report(self, noise: LabelNoise) -> FlipReport:
        """The report of these pairs.

        Args:
            noise: Margins and estimate of the run.

        Raises:
            ValueError: If the data are streamed, or there is no estimate.
        """
        if not len(self):
            raise ValueError("A flip report needs map-style training data, not streamed ones.")
        return flip_report(noise, self._ids, self._dropped, self._rows, self.dataset)


def flip_report(
    noise: LabelNoise,
    ids: list[int] | list[str],
    dropped: set[int],
    rows: list[int] | None = None,
    dataset: Dataset | None = None,
) -> FlipReport:
    """Put the report together.

    Args:
        noise: Margins and estimate.
        ids: One per row.
        dropped: Rows that TRL left out.
        rows: The user's row number of each; None for the position.
        dataset: The pairs, for the beginning of the texts of the most suspect ones.

    Raises:
        ValueError: If no pair was trained on, or the rate is neither estimated nor given.
    """
    if noise.rate_of_report is None or not bool(noise.margins.seen.any()):
        raise ValueError(
            "No flip report yet: it needs margins of at least 50 pairs from before they were "
            "trained on, and is made in the first epoch of training."
        )
    probability = noise.probability_wrong()
    actions = suggested_actions(probability.tolist(), noise.calibrated)
    not_judged = noise.margins.margin.isfinite() & ~noise.margins.judged
    for place in not_judged.nonzero().flatten().tolist():
        actions[place] = "not_judged"
    for place in dropped:
        probability[place] = math.nan
        actions[place] = "too_long"
    rows = list(range(len(ids))) if rows is None else rows
    suspects = probability.nan_to_num(nan=-1.0).argsort(descending=True)[:SHOWN].tolist()
    return FlipReport(
        pair_id=ids,
        row=rows,
        probability_wrong=probability.tolist(),
        margin=noise.margins.margin.tolist(),
        step=noise.margins.step.tolist(),
        action=actions,
        calibrated=noise.calibrated,
        texts=_texts(dataset, suspects, rows),
    )


def _texts(
    dataset: Dataset | None, places: list[int], rows: list[int]
) -> dict[int, tuple[str, str, str]]:
    """A few words of the texts of these pairs; none of data that hold tokens alone."""
    names = [name for name in ("prompt", "chosen", "rejected")
             if dataset is not None and name in dataset.column_names]  # fmt: skip
    if dataset is None or not {"chosen", "rejected"} <= set(names):
        return {}
    pairs = dataset.with_format(None).select_columns(names)
    return {rows[place]: excerpts(pairs[place]) for place in places}


def _refuse_streamed(args: "PopRiskDPOConfig") -> None:
    for name in ("pair_id_column", "pair_weight_column"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"Invalid {name}: {getattr(args, name)!r}. It needs map-style training data, not "
                "streamed ones."
            )
    if args.noise in ("cdpo", "rdpo", "weights") and args.noise_rate is None:
        raise ValueError(
            f"Invalid noise_rate: None. With noise={args.noise!r} it is estimated from map-style "
            "training data; these are streamed. Give the rate."
        )
