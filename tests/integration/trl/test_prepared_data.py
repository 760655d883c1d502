"""Data that a trainer has prepared can be used again, whole or in part, and its rows stay right."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from poprisk_integrations.trl import PopRiskDPOTrainer, cross_fit_flip_report
from poprisk_integrations.trl.pairs import drop_rows
from tests.helpers.tiny_dpo import dpo_trainer, easy_pairs, losses_of, pairs

KNOWN = {"noise": "cdpo", "noise_rate": 0.2, "stop": False, "pair_id_column": "id", "max_steps": 4}


def named(data: Dataset) -> Dataset:
    weights = [0.5 + 0.1 * row for row in range(len(data))]
    names = [f"pair {row}" for row in range(len(data))]
    return data.add_column("id", names).add_column("weight", weights)


def build(tmp_path: Path, train: Any, evaluation: Any = None, **options: Any) -> PopRiskDPOTrainer:
    """With another model as the reference: margins that tell pairs apart."""
    return dpo_trainer(tmp_path, train, evaluation, ref_model=1, **{**KNOWN, **options})


def judged(trainer: PopRiskDPOTrainer) -> dict[str, tuple[int, float]]:
    """Row and margin of every pair by its id, after one pass."""
    trainer.train()
    table = trainer.flip_report().to_pandas()
    assert table["margin"].notna().all()
    return {
        name: (row, pytest.approx(margin, abs=1e-5))
        for name, row, margin in zip(table["pair_id"], table["row"], table["margin"], strict=True)
    }


PARTS = {
    "whole": lambda data: data,
    "selected": lambda data: (
        data.filter(lambda row: row["weight"] > 0.75).shuffle(3).select(range(8))
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_prepared_data(tmp_path: Path, part: str) -> None:
    raw = named(pairs(16))
    prepared = build(tmp_path, raw, pair_weight_column="weight").train_dataset
    # Another mode, and no weights: what the first trainer added must not leak into the second.
    found = judged(build(tmp_path, PARTS[part](prepared)))
    expected = judged(build(tmp_path, PARTS[part](raw)))
    assert found == expected
    assert len({str(margin) for _, margin in expected.values()}) > 4


def test_weights_of_an_earlier_run_are_not_used(tmp_path: Path) -> None:
    raw = named(pairs(16))
    ours = raw.add_column("poprisk_weight", [100.0] * 16)  # also a name of a user's own column
    losses = []
    for data in (raw, ours):
        trainer = build(tmp_path, data)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1]


def test_prepared_data_for_evaluation_and_as_a_stream(tmp_path: Path) -> None:
    first = build(tmp_path, named(pairs(16)))
    second = build(tmp_path, first.train_dataset, first.train_dataset)
    assert second.evaluate()["eval_loss"] > 0
    stream = first.train_dataset.to_iterable_dataset()
    third = build(tmp_path, stream, pair_id_column=None, max_steps=2)
    third.train()  # its rows are numbers of another run
    assert third.state.global_step == 2
    with pytest.raises(ValueError, match="not streamed"):
        third.flip_report()


def test_prepared_data_for_a_cross_fit(tmp_path: Path) -> None:
    options = {"pair_id_column": None, "noise": "auto", "noise_rate": None, "max_steps": 2}

    def make(train: Dataset, judged: Dataset) -> PopRiskDPOTrainer:
        return build(tmp_path, train, judged, **options)

    prepared = build(tmp_path, easy_pairs(52), **options).train_dataset
    table = cross_fit_flip_report(make, drop_rows(prepared, {7}))[0].to_pandas()
    assert sorted(table["row"]) == [row for row in range(52) if row != 7]
    assert table["pair_id"].tolist() == table["row"].tolist()


def test_a_text_column_of_our_name(tmp_path: Path) -> None:
    data = pairs(16).add_column("poprisk_row", [f"r{row}" for row in range(16)])
    trainer = build(tmp_path, data, data, pair_id_column=None, max_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_rows_are_those_of_the_users_file(tmp_path: Path) -> None:
    kept = drop_rows(named(pairs(18)), {0, 5})
    found = judged(build(tmp_path, kept))
    assert {name: row for name, (row, _) in found.items()} == {
        f"pair {row}": row for row in range(18) if row not in (0, 5)
    }
    twice = drop_rows(kept.shuffle(seed=1), {3})
    for example in drop_rows(twice, set()):
        assert example["id"] == f"pair {example['poprisk_source_row']}"
