"""Batches are gathered once, and a row's first sight counts whatever rank it was on."""

import torch

from poprisk_integrations.core.untrained_margins import UntrainedMargins
from poprisk_integrations.trl.pair_columns import PairCollator, take_pair_columns
from poprisk_integrations.trl.pair_records import PairRecords


def test_first_sight_is_by_step_not_by_place() -> None:
    # What a gather gives: all of rank 0, then all of rank 1, which saw row 5 earlier.
    ranks = [
        (torch.tensor([[1.0, 0.0], [9.0, 0.0]]), torch.tensor([[3, 0], [5, 4]])),
        (torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([[5, 1], [4, 4]])),
    ]
    calls = []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        part = 0 if tensor.is_floating_point() else 1
        return torch.cat([ranks[0][part], ranks[1][part]])

    margins = UntrainedMargins(6)
    records = PairRecords(gather, beta=0.5, margins=margins)
    records.add("train", ranks[0][0], ranks[0][1][:, 0], step=0)
    assert not calls  # no communication in a step
    records.flush()
    assert margins.margin[[3, 4, 5]].tolist() == [0.5, 1.5, 1.0]
    assert margins.step[[3, 4, 5]].tolist() == [0, 4, 1]
    ratios, rows = records.take("train")
    assert rows.tolist() == [3, 5, 5, 4]
    assert ratios[:, 0].tolist() == [1.0, 9.0, 2.0, 3.0]
    assert len(calls) == 2
    assert len(records.take("train")[0]) == 0


def test_evaluations_and_data_without_rows_leave_no_margin() -> None:
    margins = UntrainedMargins(3)
    records = PairRecords(lambda tensor: tensor, beta=0.5, margins=margins)
    records.add("eval", torch.tensor([[1.0, 0.0]]), torch.tensor([2]), step=0)
    records.add("train", torch.tensor([[1.0, 0.0]]), None, step=0)
    assert records.take("eval")[1].tolist() == [2]
    assert records.take("train")[1].tolist() == [-1]
    assert not margins.seen.any()


def test_our_columns_never_reach_the_model_or_another_collator() -> None:
    seen = []

    def collate(examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        seen.extend(examples)
        return {"x": torch.tensor([example["x"] for example in examples])}

    examples = [{"x": 1, "poprisk_row": 7, "poprisk_weight": 0.5}, {"x": 2, "poprisk_row": 3, "poprisk_weight": 2}]  # fmt: skip  # noqa: E501
    batch = PairCollator(collate)(examples)
    assert seen == [{"x": 1}, {"x": 2}]
    assert batch["poprisk_weight"].dtype == torch.float32
    rest, rows, weights = take_pair_columns(batch)
    assert list(rest) == ["x"]
    assert rows is not None
    assert rows.tolist() == [7, 3]
    assert weights is not None
    assert weights.tolist() == [0.5, 2.0]
    assert take_pair_columns({"x": 1}) == ({"x": 1}, None, None)
