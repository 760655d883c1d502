"""The recipe frozen-features-head: ridge regression by GCV, embeddings of a frozen encoder."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.recipe_script import RECIPES, load_script

RECIPE = RECIPES / "frozen-features-head"


@pytest.fixture(scope="module")
def script():
    return load_script("frozen-features-head")


def test_smoke_has_a_head_that_wrong_labels_do_not_harm(script, offline):
    report = script.main(["--config", str(RECIPE / "smoke.yaml")])
    out = offline / "out-smoke"
    assert list(offline.iterdir()) == [out]
    assert json.loads((out / "head.json").read_text()) == report
    assert report["accuracy"] > 0.9  # 0.7 of the labels that it has seen are right
    assert 0.55 < report["accuracy_left_out"] < 0.75  # and no head can guess the others
    head = load_file(out / "head.safetensors")
    assert {name: tuple(x.shape) for name, x in head.items()} == {"weight": (128, 5), "bias": (5,)}


@pytest.mark.parametrize("inputs", [7, 60], ids=["fewer than examples", "more than examples"])
def test_the_head_is_ridge_regression_and_leaves_out_exactly(script, inputs):
    draw = torch.Generator().manual_seed(0)
    causes = torch.randn(40, 3, generator=draw, dtype=torch.float64)
    x = causes @ torch.randn(3, inputs, generator=draw, dtype=torch.float64)
    x += torch.randn(40, inputs, generator=draw, dtype=torch.float64)
    labels = (causes[:, 0] + torch.randn(40, generator=draw) > 0).long()
    head = script.ridge(x, labels, 2)
    y = torch.nn.functional.one_hot(labels, 2).double()

    def solved(rows, strength):
        mean = x[rows].mean(0)
        own = x[rows] - mean
        gram = own.T @ own + strength * torch.eye(inputs)
        weight = torch.linalg.solve(gram, own.T @ (y[rows] - y[rows].mean(0)))
        return weight, y[rows].mean(0) - mean @ weight

    weight, bias = solved(range(40), head.strength)
    torch.testing.assert_close(head.weight, weight)
    torch.testing.assert_close(head.bias, bias)

    def gcv(strength):
        own = x - x.mean(0)
        inner = torch.linalg.inv(own.T @ own + strength * torch.eye(inputs))
        hat = own @ inner @ own.T + 1 / 40
        return float(((y - hat @ y).square().sum()) / (40 - hat.trace()) ** 2)

    assert gcv(head.strength) <= min(gcv(head.strength * f) for f in (0.3, 3.0))
    # Fitted without example 3, with the same strength.
    ones = torch.cat([x - x.mean(0), torch.ones(40, 1)], 1)
    penalty = head.strength * torch.eye(inputs + 1)
    penalty[-1, -1] = 0
    rest = [i for i in range(40) if i != 3]
    without = torch.linalg.solve(ones[rest].T @ ones[rest] + penalty, ones[rest].T @ y[rest])
    torch.testing.assert_close(head.left_out[3], ones[3] @ without)


def test_texts_are_embedded_whatever_they_are_padded_to(script, offline):
    """A directory of CSV files, an encoder and its tokenizer from a directory, as from the Hub."""
    bundled = load_script("trainer-classification", "bundled.py")
    reviews = bundled.reviews()
    model, tokenizer = bundled.tiny_bert(reviews["train"]["text"], ["bad", "good"])
    model.bert.save_pretrained(offline / "bert")
    tokenizer.save_pretrained(offline / "bert")
    (offline / "data").mkdir()
    for split in ("train", "test"):
        with (offline / "data" / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["review", "mood"])
            for text, label in zip(reviews[split]["text"], reviews[split]["label"], strict=True):
                writer.writerow([text, ("bad", "good")[label]])
    words = ["--model_name_or_path", "bert", "--dataset_name", "data", "--text_column", "review"]
    words += ["--label_column", "mood", "--wrong_labels", "0.2"]
    report = script.main(words)
    assert report["classes"] == ["bad", "good"]
    assert report["accuracy"] > 0.75  # a random encoder
    args = script.parse([*words, "--batch_size", "1"])
    texts = ["well the soup was superb", "at first the novel was dull and the hotel ugly"]
    alone = script.embed(args, texts)
    args.batch_size = 2
    torch.testing.assert_close(script.embed(args, texts), alone)


def test_config_parses_and_mistakes_are_named(script, tmp_path, capsys):
    config = ["--config", str(RECIPE / "config.yaml")]
    assert script.parse(config).dataset_name == "fancyzhx/ag_news"
    assert script.parse([*config, "--wrong_labels", "0"]).wrong_labels == 0.0
    (tmp_path / "mine.yaml").write_text("wrong_lables: 0.1\n")
    for words, says in (
        (["--config", str(tmp_path / "mine.yaml")], "wrong_lables"),
        ([*config, "--wrong_labels", "3"], "Invalid --wrong_labels: 3.0. From 0 to 1."),
        ([*config, "--dataset_name", "bundled:digits"], "name it for both"),
    ):
        with pytest.raises(SystemExit):
            script.parse(words)
        assert says in capsys.readouterr().err
