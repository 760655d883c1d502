"""The demo: text and pairs that leak nothing, metrics by hand, and sentences that say the numbers.

Its options are in tests/goldens/cli/main.txt; a whole quick run is in `test_demo_run`.
"""

import io
import json
import math
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn, tensor

from poprisk_integrations.cli.demo import job
from poprisk_integrations.cli.demo.corpus import (
    PreferencePair,
    TextWindow,
    cut_windows,
    make_pairs,
    reference_texts,
    split_corpus,
    starts_word,
    train_tokenizer,
)
from poprisk_integrations.cli.demo.findings import (
    Arm,
    Comparison,
    Evidence,
    findings,
    next_steps,
)
from poprisk_integrations.cli.demo.job import paired, run_job
from poprisk_integrations.cli.demo.scoring import DPOTask, ranking_scores
from poprisk_integrations.cli.demo.settings import QUICK
from poprisk_integrations.cli.demo.show import print_arms
from poprisk_integrations.cli.main import main

GOLDEN = Path(__file__).parents[2] / "goldens" / "cli" / "demo_quick.json"

# Token 0 goes on with a word, token i > 0 starts one; so documents can count positions.
WORDS = [False] + [True] * 999


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return reference_texts()


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Any:
    return train_tokenizer(texts[:8], 512)


def test_reference_texts_are_plain_lines(texts: list[str]) -> None:
    assert len(texts) > 50
    assert sum(map(len, texts)) > 300_000
    assert all(text.isascii() and text == " ".join(text.split()) for text in texts)
    assert not any(set(word) <= set("*=-~^#") for text in texts for word in text.split())


def test_windows_tile_the_text_and_keep_words_whole() -> None:
    windows = cut_windows(list(range(1, 31)), WORDS, 4, 8)
    assert [window.prompt for window in windows][:2] == [(1, 2, 3, 4), (9, 10, 11, 12)]
    assert windows[0].continuation == tuple(range(5, 13))
    for before, after in pairwise(windows):
        assert before.continuation[-1] + 1 == after.continuation[0]
    tokens = [1, 0, 2, 0, 3, 0, 0, 0, 4, 0, 5, 0, 6]
    for window in cut_windows(tokens, WORDS, 2, 5):
        assert 0 not in (window.prompt[0], window.continuation[0])
        assert len(window.prompt) >= 2
        assert 2.5 <= len(window.continuation) <= 5
    # 3 0 0 0 fits into 5 tokens, 3 0 0 0 4 would break the word 4 0.
    assert cut_windows(tokens, WORDS, 4, 5)[0].continuation == (3, 0, 0, 0)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [0] * 8])
def test_no_window_in_too_short_a_text(tokens: list[int]) -> None:
    assert cut_windows(tokens, WORDS, 4, 8) == []


def test_a_split_shares_no_token_and_follows_the_seed() -> None:
    def split(counts: tuple[int, int] = (5, 6), seed: int = 0) -> list[list[TextWindow]]:
        sizes = replace(QUICK, block_tokens=40, prompt_tokens=4, continuation_tokens=8)
        documents = [list(range(1, 200)), list(range(200, 400))]
        return split_corpus(documents, WORDS, sizes, counts, seed)

    parts = split()
    assert [len(part) for part in parts[:2]] == [5, 6]
    tokens = [{token for w in part for token in w.prompt + w.continuation} for part in parts]
    assert all(tokens)
    assert len(set.union(*tokens)) == sum(map(len, tokens))
    assert split(seed=3) == split(seed=3) != split(seed=4)
    with pytest.raises(ValueError, match="too few windows for 5 and 500"):
        split((5, 500))


def test_tokens_survive_decoding(texts: list[str], tokenizer: Any) -> None:
    """TRL sees text: cut at words, it must give back the tokens of the window."""
    assert train_tokenizer(texts[:8], 512).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 512
    windows = cut_windows(tokenizer(texts[0])["input_ids"], starts_word(tokenizer), 8, 16)
    assert len(windows) > 10
    for window in windows:
        prompt, human = (tokenizer.decode(part) for part in (window.prompt, window.continuation))
        assert tokenizer(prompt)["input_ids"] == list(window.prompt)
        assert tokenizer(prompt + human)["input_ids"] == [*window.prompt, *window.continuation]


def test_rows_say_what_the_labels_say() -> None:
    pair = PreferencePair(" p", " h", " s")
    assert pair.row() == {"prompt": " p", "chosen": " h", "rejected": " s"}
    swapped = replace(pair, swapped=True)
    assert swapped.row() == {"prompt": " p", "chosen": " s", "rejected": " h"}


def test_a_sample_equal_to_the_human_text_makes_no_pair(tokenizer: Any) -> None:
    tokens = tokenizer(" the value of an object")["input_ids"]
    window = TextWindow(tuple(tokens[:2]), tuple(tokens[2:]))
    other = tokenizer(" a name")["input_ids"]
    (pair,) = make_pairs(tokenizer, [window, window], [tokens[2:], other])
    assert pair.sample == " a name"
    assert pair.prompt + pair.human == " the value of an object"


class Constant(nn.Module):
    """The same next-token distribution everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        assert not use_cache
        assert attention_mask.shape == input_ids.shape

        class Output:
            logits = self.logits.expand(*input_ids.shape, -1)

        return Output


def test_a_measurement_by_hand(tokenizer: Any) -> None:
    """A uniform reference, and a policy that triples the odds of one word's tokens.

    The continuation and its end count: log ratio = tokens * gain + hits * log 3 + log 2.
    """
    size = len(tokenizer)
    pairs = [
        PreferencePair(" the", " value value", " name"),
        PreferencePair(" an", " of", " value of a", swapped=True),
        PreferencePair(" an", " name", " name"),
    ]
    value, end = tokenizer(" value")["input_ids"], tokenizer.eos_token_id
    boosted = torch.zeros(size)
    boosted[end] = math.log(2.0)
    boosted[value] = math.log(3.0)
    settings = replace(QUICK, beta=0.5)
    reference: Any = Constant(torch.zeros(size)).train()
    task = DPOTask(reference, tokenizer, pairs, pairs, settings)
    assert reference.training
    point, scores = task.measure(Constant(boosted), 7)
    gain = math.log(size) - float(boosted.exp().sum().log())  # of any token that is not boosted
    ratios = []
    for pair in pairs:
        for text in (pair.human, pair.sample):
            ids = tokenizer(text)["input_ids"]
            hits = sum(token in value for token in ids)
            ratios.append((len(ids) + 1) * gain + hits * math.log(3.0) + math.log(2.0))
    assert task.heldout.log_ratios(Constant(boosted)).flatten().tolist() == pytest.approx(
        ratios, abs=1e-4
    )
    assert scores.tolist() == [1.0, 0.0, 0.5]
    assert (point.step, point.accuracy) == (7, 0.5)
    assert (point.swapped_fitted, point.clean_fitted) == (1.0, 0.75)
    assert point.drift == pytest.approx(0.5 * sum(map(abs, ratios)) / 6, rel=1e-4)


def test_ranking_scores_and_paired_differences() -> None:
    ratios = tensor([[0.5, -0.5], [-1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    assert ranking_scores(ratios).tolist() == [1.0, 0.0, 0.5, 1.0]
    # differences 1 0 0 -1 1: mean 0.2, variance 0.7
    first, second = tensor([1.0, 1.0, 0.0, 0.0, 1.0]), tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    found = paired(first, second)
    assert found.difference == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(math.sqrt(0.7 / 5))
    assert paired(first, first) == Comparison(0.0, 0.0)


@pytest.mark.parametrize(
    ("difference", "error", "verdict"),
    [(0.041, 0.02, "ahead"), (0.04, 0.02, "level"), (0.0, 0.0, "level"), (-0.04, 0.02, "level"),
     (-0.041, 0.02, "behind")],
)  # fmt: skip
def test_verdict_at_two_standard_errors(difference: float, error: float, verdict: str) -> None:
    assert Comparison(difference, error).verdict == verdict


# What the sentences say of what the numbers say, losses included.

WON, LOST, LEVEL = Comparison(0.08, 0.02), Comparison(-0.08, 0.02), Comparison(0.01, 0.02)
FOUND = {"auc": 0.847, "flagged": 100, "precision": 0.8}


def arm(name: str, accuracy: float, **changes: float) -> Arm:
    values = {"trainings": 1.0, "accuracy_se": 0.015, "swapped_fitted": 0.99, "clean_fitted": 1.0}
    return Arm(name=name, accuracy=accuracy, **{**values, "drift": 0.4, **changes})


def evidence(
    folds: Comparison = WON,
    over_held_out: Comparison = LEVEL,
    ours: Comparison = LEVEL,
    peak: float = 0.82,
    **changes: Any,
) -> Evidence:
    known = {
        ("folds", "plain"): folds,
        ("folds", "held out"): over_held_out,
        ("ours", "plain"): ours,
    }
    arms = {
        "plain": arm("AdamW to the end", 0.75, peak_accuracy=peak, peak_epoch=2),
        "held out": arm("AdamW, a tenth held out", 0.82),
        "ours": arm("PopRiskDPOTrainer", 0.76),
        "folds": arm("mean of 4 fold models", 0.83, trainings=2.4, swapped_fitted=0.8),
    }
    values: dict[str, Any] = {
        "suspects": FOUND, "estimate": "28 % of the labels look wrong", "calibrated": True,
        "swapped_share": 0.3, "quick": False,
    }  # fmt: skip
    return Evidence(arms=arms, compare=lambda *two: known[two], **{**values, **changes})


# What is special about the numbers, which paragraph, what it says and what nobody may say.
SAID: list[tuple[dict[str, Any], int, list[str], str]] = [
    ({}, 0, ["28 % of the labels look wrong; 30 % were swapped", "probability 0.85 (AUC)",
             "Of the 100 pairs with P(wrong) of 0.5 or more, 80 % were swapped"], "ranking here"),
    ({"calibrated": False}, 0, ["is a ranking here: look at its top, and cut nowhere"], "Of the"),
    ({"suspects": {**FOUND, "flagged": 0, "precision": None}}, 0,
     ["No label is more probably wrong than right"], "Of the"),
    ({"suspects": {**FOUND, "auc": None}}, 0, ["30 % were swapped"], "AUC"),
    ({}, 1, ["mean of 4 fold models: 83.0 % of the clean held-out pairs",
             "Ahead of AdamW to the end (75.0 %) by 8.0 points (standard error 2.0 points)",
             "Level with AdamW, a tenth held out (82.0 %): the difference of 1.0 points",
             "its price is 2.4 trainings"], "Behind"),
    ({"folds": LOST}, 1, ["Behind AdamW to the end (75.0 %) by 8.0 points"], "Ahead"),
    ({}, 2, ["PopRiskDPOTrainer, one training, nothing held out: 76.0 %. Level with"], "Ahead"),
    ({"ours": WON}, 2, ["Ahead of AdamW to the end"], "Level"),
    ({}, 3, ["ends with 99 % of the wrong labels fitted beside 100 % of the right",
             "with 80 % and 100 %", "best epoch (2)", "82.0 %, about as much"], "less"),
    ({"peak": 0.90}, 3, ["90.0 %, more than the mean of 4 fold models"], "about"),
    ({"peak": 0.76}, 3, ["76.0 %, less than the mean of 4 fold models"], "about"),
    ({}, 4, ["one seed of one very small model", "standard error of 1.5 points"], "mean little"),
    ({"quick": True}, 4, ["numbers mean little"], "#"),
]  # fmt: skip


@pytest.mark.parametrize(("numbers", "place", "said", "unsaid"), SAID)
def test_sentences(numbers: dict[str, Any], place: int, said: list[str], unsaid: str) -> None:
    text = findings(evidence(**numbers))[place]
    assert all(words in text for words in said)
    assert unsaid not in text


@pytest.mark.parametrize(
    ("numbers", "command", "why"),
    [
        ({}, "poprisk clean ", "worth its price"),
        ({"folds": LEVEL, "ours": WON}, "poprisk dpo ", "PopRiskDPOTrainer was ahead"),
        ({"folds": LOST}, "poprisk dpo ", "nothing was ahead by more than noise"),
    ],
)
def test_what_to_do_next_follows_the_numbers(
    numbers: dict[str, Any],
    command: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said, commands = next_steps(evidence(**numbers))
    assert why in said
    assert commands[0] == "poprisk check pairs.jsonl"
    assert main(shlex.split(commands[1])[1:]) == 0
    last = shlex.split(commands[-1])
    assert commands[-1].startswith(command)
    assert Path(last[last.index("--config") + 1]).is_file()


def test_table_fits_eighty_columns() -> None:
    case = evidence()
    console = Console(width=80, file=io.StringIO())
    compared = {row["arm"]: row for row in case.comparisons() if row["minus"] == "plain"}
    print_arms(console, case.arms, compared)
    text = console.file.getvalue()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "\u2026" not in text  # nothing cut
    assert "mean of 4 fold models" in text
    assert "+0.080 \u00b1 0.020" in text


@pytest.mark.slow
def test_demo_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was when the golden was written: settings, check, arms and near figures."""
    out, kept = tmp_path / "new" / "demo", []

    def once(*args: Any, **kwargs: Any) -> Any:
        kept[:] = kept or [run_job(*args, **kwargs)]
        return kept[0]

    monkeypatch.setattr(job, "run_job", once)
    assert main(["demo", "--quick", "--json", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    record, expected = json.loads(captured.out), json.loads(GOLDEN.read_text())
    assert "checking the pairs" in captured.err
    assert record.pop("seconds").keys() == expected.pop("seconds").keys()
    for one in (record, expected):
        del one["environment"], one["findings"], one["next"]
    assert record["settings"] == expected["settings"]
    assert record["data"]["example"] == expected["data"]["example"]
    assert record["arms"].keys() == expected["arms"].keys()
    for name, found in record["arms"].items():
        assert found.keys() == expected["arms"][name].keys()
        assert found["accuracy"] == pytest.approx(expected["arms"][name]["accuracy"], abs=0.1)
    assert record["check"].keys() == expected["check"].keys()
    assert record["check"]["num_pairs"] == record["data"]["train_pairs"]
    suspects = record["suspects"]["first"]
    assert len({pair["row"] for pair in suspects}) == 4
    assert record["arms"]["folds"]["trainings"] == pytest.approx(1.0)  # of two halves
    assert json.loads((out / "results.json").read_text())["runs"] == record["runs"]
    assert sorted(path.name for path in out.iterdir()) == ["report.png", "results.json"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    heads = ("1. Check", "2. Suspects", "3. Models", "4. On pairs of your own")
    places = [shown.index(head) for head in heads]
    assert places == sorted(places)
    assert suspects[0]["chosen"][:20] in shown
    assert "poprisk check pairs.jsonl" in shown
