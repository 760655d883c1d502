"""What is found in preference pairs, and what is not; each finding with the rows it is about."""

import random
from typing import Any

import pytest
from datasets import Dataset
from scipy.stats import binomtest

from poprisk_integrations.core.noise_rate import double_annotation_rate
from poprisk_integrations.trl.pair_checks import Finding, PairCheck, check_pairs
from poprisk_integrations.trl.pairs import drop_rows
from tests.helpers.tiny_dpo import tiny_tokenizer


def row(chosen: Any, rejected: Any, prompt: Any = "p", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def checked(rows: list[dict[str, Any]], **options: Any) -> PairCheck:
    return check_pairs(Dataset.from_list(rows), **options)


def found(check: PairCheck) -> dict[str, Finding]:
    return {finding.name: finding for finding in check.findings}


def message(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def as_conversation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": message(one["prompt"], "user"),
            "chosen": message(one["chosen"]),
            "rejected": message(one["rejected"]),
        }
        for one in rows
    ]


def with_common_start(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {side: one["prompt"] + one[side] for side in ("chosen", "rejected")}
        for one in as_conversation(rows)
    ]


CLEAN = [row(f"a{i}", f"b{i}") for i in range(8)]
FAULTY = [
    row("a", "b"),
    row("", "b"),
    row("a", "a"),
    row("a", "b"),  # a copy of row 0
    row("b", "a"),  # against rows 0 and 3
    row("b", "a", prompt="q"),  # of another prompt
    row("c", "ab"),
]
FORMATS = {
    "text": lambda rows: rows,
    "conversations": as_conversation,
    "with a common start": with_common_start,
}


@pytest.mark.parametrize("format", FORMATS)
def test_faults_and_their_rows(format: str) -> None:
    check = checked(FORMATS[format](FAULTY))
    rows = {name: finding.rows for name, finding in found(check).items()}
    assert rows.pop("length") == ()
    assert rows.pop("repeated_labels") == ()
    assert rows == {"empty": (1,), "identical": (2,), "copies": (3,), "both_ways": (4,)}
    assert check.must_fix
    assert check.advice.startswith("leave these rows out")


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_found_in_clean_pairs(format: str) -> None:
    check = checked(FORMATS[format](CLEAN))
    assert check.findings == ()
    assert (check.length, check.repeated, check.annotators) == (None, None, ())
    assert not check.must_fix
    assert str(check) == "8 pairs, nothing found"


def test_missing_texts_are_empty() -> None:
    rows = [row("a", "b"), row(None, "b"), row("a", None), row("a", "b", None), row(" ", "c")]
    finding = found(checked(rows))["empty"]
    assert (finding.rows, finding.level) == ((1, 2, 3, 4), "fix")


def test_rows_are_those_of_the_file_and_few() -> None:
    data = Dataset.from_list([*CLEAN, *[row("a", "a")] * 9])
    (finding,) = check_pairs(drop_rows(data, {0, 9})).findings
    assert finding.rows == (8, 10, 11, 12, 13)
    assert str(finding) == (
        "8 of 15 pairs: chosen and rejected are the same (rows 8, 10, 11, 12, 13, ...)"
    )


@pytest.mark.parametrize(("biased", "level"), [(240, "warn"), (165, "note"), (60, "warn")])
def test_length_bias(biased: int, level: str) -> None:
    rows = [row(*("aa", "b") if i < biased else ("b", "aa"), prompt=str(i)) for i in range(300)]
    check = checked([*rows, *rows[:50], row("x", "y")])  # copies count once, equal lengths never
    assert check.length is not None
    assert check.length.num_pairs == 300
    interval = binomtest(biased, 300).proportion_ci(method="wilson")
    assert (check.length.low, check.length.high) == pytest.approx(tuple(interval), abs=1e-4)
    assert found(check)["length"].level == level


def labelled(
    wrong: dict[str, float], count: int, seed: int = 0, share: float = 1.0
) -> list[dict[str, Any]]:
    """Pairs of equal lengths, each labelled by annotators who are wrong so often."""
    rng = random.Random(seed)
    return [
        row(*(("a", "b") if rng.random() < error else ("b", "a")), prompt=str(i), annotator=who)
        for i in range(count)
        for who, error in wrong.items()
        if rng.random() < share
    ]


@pytest.mark.parametrize("people", ["AB", "ABCDE"])
def test_noise_rate_from_annotators(people: str) -> None:
    rows = labelled(dict.fromkeys(people, 0.2), 2000)
    check = checked(rows)
    repeated = check.repeated
    assert repeated is not None
    assert repeated.rate is not None
    assert repeated.standard_error is not None
    assert repeated.num_pairs == 2000
    assert repeated.by_annotators
    assert abs(repeated.rate - 0.2) < 3 * repeated.standard_error < 0.04
    assert repeated.low < 0.2 < repeated.high  # type: ignore[operator]
    if people == "AB":
        differ = sum(a["chosen"] != b["chosen"] for a, b in zip(rows[::2], rows[1::2], strict=True))
        exact = double_annotation_rate(2000, differ)
        assert (repeated.rate, repeated.standard_error) == pytest.approx(exact)
    assert "copies" not in found(check)  # another annotator's label is no copy
    # Rows written again are no second label.
    assert checked(rows * 3).repeated == repeated


def test_labels_of_nobody_are_labels_unless_all_may_be_copies() -> None:
    once = [row("a", "b", str(i)) for i in range(90)]
    twice = [*once, *[row("a", "b", str(i)) for i in range(40)], row("b", "a", "50")]
    check = checked(twice)
    assert check.repeated is not None
    assert (check.repeated.num_pairs, check.repeated.by_annotators) == (41, False)
    assert check.repeated.rate == double_annotation_rate(41, 1)[0]
    assert "if no label is a copy" in found(check)["repeated_labels"].text
    assert checked(twice * 3).repeated == check.repeated  # folds of one data set
    copies = checked(twice[:-1])
    assert copies.repeated is not None
    assert copies.repeated.rate is None
    assert "repeated_labels" not in found(copies)


def test_labels_that_differ_like_random_ones_give_no_rate() -> None:
    rows = [one for i in range(20) for one in (row("a", "b", str(i)), row("b", "a", str(i)))]
    check = checked([*rows, row("a", "b", "x"), row("a", "b", "x")])
    assert check.repeated is not None
    assert (check.repeated.num_pairs, check.repeated.rate) == (21, None)
    assert "tells no noise rate" in found(check)["repeated_labels"].text


def test_one_bad_annotator_is_seen_and_no_other() -> None:
    rows = labelled({"ann": 0.05, "bob": 0.1, "cy": 0.45, "di": 0.1}, 300, share=0.6)
    check = checked(rows)
    first, *others = check.annotators
    assert (first.name, first.stands_out) == ("cy", ("disagrees",))
    assert all(one.stands_out == () for one in others)
    assert first.disagreement == pytest.approx(0.46, abs=0.1)
    assert first.disagreement_without == pytest.approx(0.15, abs=0.06)
    finding = found(check)["annotator"]
    assert finding.count == first.pairs == sum(one["annotator"] == "cy" for one in rows)
    assert all(rows[number]["annotator"] == "cy" for number in finding.rows)
    assert "annotator 'cy'" in finding.advice
    assert sum(one.pairs for one in check.annotators) == len(rows)


def test_disagreement_by_hand() -> None:
    one, other = ("a", "b"), ("b", "a")
    votes = {"x": {"A": one, "B": one, "C": other}, "y": {"A": one, "C": other}, "z": {"A": one}}
    rows = [
        row(*label, prompt, annotator=who)
        for prompt, labels in votes.items()
        for who, label in labels.items()
    ]
    rows += [row(*one, "y", annotator="B"), row(*other, "y", annotator="B")]  # B has no label of y
    shares = {
        one.name: (one.pairs, one.shared, one.disagreement, one.disagreement_without)
        for one in checked(rows).annotators
    }
    assert shares == {
        "A": (3, 2, (1 / 2 + 1) / 2, 1.0),  # B and C differ on x
        "B": (3, 1, 1 / 2, (1 + 1) / 2),
        "C": (2, 2, 1.0, 0.0),
    }


@pytest.mark.parametrize("people", ["AB", "ABCDEFGH"])
def test_equal_annotators_do_not_stand_out(people: str) -> None:
    for seed in range(5):
        check = checked(labelled(dict.fromkeys(people, 0.3), 60, seed, share=0.5))
        assert [one.stands_out for one in check.annotators] == [()] * len(people)


def test_an_annotator_who_goes_by_length() -> None:
    rng = random.Random(0)
    rows = []
    for i in range(600):
        who = rng.choice("ABCD")
        longer = rng.random() < (0.95 if who == "B" else 0.55)
        rows.append(row(*(("aa", "b") if longer else ("b", "aa")), prompt=str(i), rater_id=who))
    check = checked(rows)
    assert check.annotator_column == "rater_id"
    assert {one.name: one.stands_out for one in check.annotators} == {
        "A": (), "B": ("prefers longer",), "C": (), "D": (),
    }  # fmt: skip
    assert all(one.disagreement is None for one in check.annotators)  # nobody shares a pair


def test_which_column_tells_the_annotators() -> None:
    rows = [row("a", "b", str(i), who=i % 2, worker=["x"]) for i in range(4)]
    assert checked(rows).annotator_column is None  # lists name nobody
    check = checked(rows, annotator_column="who")
    assert [(one.name, one.pairs) for one in check.annotators] == [("0", 2), ("1", 2)]
    with pytest.raises(ValueError, match=r"Invalid annotator_column: 'x'. dataset has no such"):
        checked(rows, annotator_column="x")
    with pytest.raises(
        ValueError, match=r"Invalid annotator_column: 'worker'. It must hold a text"
    ):
        checked(rows, annotator_column="worker")
    unknown = [row("a", "b", str(i), annotator=[None, "", "A"][i]) for i in range(3)]
    assert [(one.name, one.pairs) for one in checked(unknown).annotators] == [("A", 1)]


def test_what_is_no_such_data_set_is_refused() -> None:
    data = Dataset.from_list(CLEAN)
    with pytest.raises(ValueError, match="Invalid dataset: IterableDataset"):
        check_pairs(data.to_iterable_dataset())
    tokens = Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]})
    for other in (tokens, data.with_transform(lambda batch: batch)):
        with pytest.raises(ValueError, match="Invalid dataset: it holds tokens, or makes"):
            check_pairs(other)
    with pytest.raises(ValueError, match="dataset has no column 'rejected'"):
        check_pairs(data.remove_columns("rejected"))
    with pytest.raises(ValueError, match="Invalid truncation_mode: 'middle'"):
        check_pairs(data, truncation_mode="middle")
    with pytest.raises(ValueError, match=r"Invalid max_length: 0. Must be >= 1"):
        check_pairs(data, tokenizer=tiny_tokenizer(), max_length=0)
    with pytest.raises(ValueError, match=r"Invalid max_length: 9. It counts tokens"):
        check_pairs(data, max_length=9)


def test_no_rows() -> None:
    data = Dataset.from_list(CLEAN).select([])
    check = check_pairs(data, tokenizer=tiny_tokenizer())
    assert (check.num_pairs, check.findings) == (0, ())


def test_progress_is_told() -> None:
    told: list[int] = []
    check_pairs(Dataset.from_list(CLEAN), tokenizer=tiny_tokenizer(), progress=told.append)
    assert told == [8, 8]
