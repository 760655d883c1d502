"""Ids, weights and vocabularies that cannot be are refused, with the row that is wrong."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from poprisk_integrations.trl.pair_checks import check_vocabulary, check_weights, pair_ids


def data(**columns: Any) -> Dataset:
    return Dataset.from_dict(columns)


def test_ids_of_a_column_keep_their_type() -> None:
    assert pair_ids(data(id=["b", "a"]), "id") == ["b", "a"]
    assert pair_ids(data(id=[7, 3]), "id") == [7, 3]
    assert pair_ids(data(id=["b", "a"]), None) == [0, 1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "Rows 0 and 2 have the same id 'a'"),
        (["a", None], "Row 1 has no id"),
        (["", "b"], "Row 0 has no id"),
        ([0.5, 1.0], r"Row 0 has 0.5; ids must be text or integers"),
        ([True, False], r"Row 0 has True"),
    ],
)
def test_ids_that_are_none(ids: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid pair_id_column: 'id'. {message}"):
        pair_ids(data(id=ids), "id")


@pytest.mark.parametrize("check", [pair_ids, check_weights])
def test_missing_columns(check: Any) -> None:
    with pytest.raises(ValueError, match=r"'w'. train_dataset has no such column; found \['x'\]"):
        check(data(x=[1]), "w")


def test_weights_may_be_zero_for_some() -> None:
    assert check_weights(data(w=[0, 2]), "w") == [0.0, 2.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5], "Row 1 has -0.5"),
        ([math.nan, 1.0], "Row 0 has nan"),
        ([1.0, math.inf], "Row 1 has inf"),
        ([1.0, None], "Row 1 has None"),
        (["1", "2"], "Row 0 has '1'"),
        ([0.0, 0.0], "All weights are zero"),
    ],
)
def test_weights_that_are_none(weights: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid pair_weight_column: 'w'. {message}"):
        check_weights(data(w=weights), "w")


def model(size: int | None) -> Any:
    return SimpleNamespace(config=SimpleNamespace(vocab_size=size))


def test_vocabularies() -> None:
    check_vocabulary(model(10), None)
    check_vocabulary(model(10), model(10))
    check_vocabulary(SimpleNamespace(), model(10))  # nothing to compare
    with pytest.raises(ValueError, match="its vocabulary has 12 tokens, that of the model 10"):
        check_vocabulary(model(10), model(12))
