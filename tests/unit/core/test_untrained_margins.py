"""A pair's first margin stays, whatever comes later."""

import pytest
import torch

from poprisk_integrations.core.untrained_margins import UntrainedMargins


def test_later_margins_of_a_pair_are_ignored() -> None:
    record = UntrainedMargins(4)
    record.record(torch.tensor([3, 1]), torch.tensor([0.5, -2.0]), step=0)
    record.record(torch.tensor([1, 0]), torch.tensor([9.0, 1.0]), step=7)
    assert record.margin[[0, 1, 3]].tolist() == [1.0, -2.0, 0.5]
    assert record.step.tolist() == [7, 0, -1, 0]
    assert record.seen.tolist() == [True, True, False, True]


def test_of_a_row_that_occurs_twice_the_first_counts() -> None:
    record = UntrainedMargins(3)
    rows = torch.tensor([2, 0, 2, 0, 2])
    record.record(rows, torch.arange(5.0), step=torch.tensor([1, 1, 2, 2, 3]))
    assert record.margin[[0, 2]].tolist() == [1.0, 0.0]
    assert record.step.tolist() == [1, -1, 1]


def test_padding_is_left_out_and_infinite_margins_count_as_seen() -> None:
    record = UntrainedMargins(2)
    record.record(torch.tensor([-1, 1, -1]), torch.tensor([5.0, torch.inf, 5.0]), step=0)
    assert record.margin.isnan().all()
    record.record(torch.tensor([1]), torch.tensor([3.0]), step=1)
    assert record.margin.isnan().all()
    assert record.step.tolist() == [-1, 0]


def test_data_without_rows_leave_an_empty_record_empty() -> None:
    record = UntrainedMargins(0)
    record.record(torch.tensor([-1, -1]), torch.tensor([1.0, 2.0]), step=0)
    assert len(record) == 0


def test_rows_beyond_the_data_are_refused() -> None:
    with pytest.raises(IndexError, match="row 2 of a data set of 2 rows"):
        UntrainedMargins(2).record(torch.tensor([2]), torch.tensor([1.0]), step=0)


def test_nothing_to_record() -> None:
    record = UntrainedMargins(2)
    record.record(torch.empty(0, dtype=torch.int64), torch.empty(0), step=0)
    assert not record.seen.any()


def test_state_goes_round() -> None:
    record = UntrainedMargins(3)
    record.record(torch.tensor([1]), torch.tensor([0.1], dtype=torch.float64), step=5)
    other = UntrainedMargins(3)
    other.load_state_dict(record.state_dict())
    other.record(torch.tensor([1]), torch.tensor([9.0]), step=6)
    assert other.margin[1] == record.margin[1]
    with pytest.raises(ValueError, match="of 3 pairs, the data have 4"):
        UntrainedMargins(4).load_state_dict(record.state_dict())


def test_judged_from_the_step_on_at_which_the_model_has_moved() -> None:
    record = UntrainedMargins(10)
    margins = torch.tensor([0.0, 0.0, 1e-3, -2e-3, 0.4, -0.3, 1.0, 0.0, torch.inf, -0.8])
    record.record(torch.arange(10), margins, step=torch.arange(10) // 2)
    # Step 2 is the first with a margin of the usual size; a small one beside it counts, zero never.
    assert record.judged.tolist() == [*[False] * 4, True, True, True, False, False, True]
    assert not UntrainedMargins(3).judged.any()


def test_margins_of_one_moment_are_all_judged() -> None:
    record = UntrainedMargins(3)
    record.record(torch.arange(3), torch.tensor([1e-5, -2.0, 3.0]), step=0)
    assert record.judged.all()
