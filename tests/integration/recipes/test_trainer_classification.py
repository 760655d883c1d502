"""The recipe trainer-classification: options by name in YAML, the stop's checkpoint as the best."""

import json

import pytest
from datasets import Dataset, DatasetDict

from poprisk_integrations import PopRiskAdamW
from tests.helpers.recipe_script import RECIPES, load_script

RECIPE = RECIPES / "trainer-classification"
SMOKE = ["--config", str(RECIPE / "smoke.yaml"), "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def script():
    return load_script("trainer-classification")


def test_smoke_stops_and_restores_its_best_checkpoint(script, offline):
    trainer = script.main(SMOKE)
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, PopRiskAdamW)
    assert {group["gate"] for group in optimizer.param_groups} == {"soft", "none"}
    out = offline / "out-smoke"
    assert list(offline.iterdir()) == [out]
    report = json.loads((out / "poprisk_stop.json").read_text())
    assert report["stopped"]
    assert report["stop_step"] < 360  # of 720
    assert trainer.state.best_global_step == report["stop_step"]
    assert report["best_model_checkpoint"].endswith(f"checkpoint-{report['stop_step']}")
    evaluated = json.loads((out / "eval_results.json").read_text())
    assert evaluated["eval_accuracy"] > 0.9  # 0.8 of the labels it has seen are right
    assert (out / "model.safetensors").is_file()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for key in ("poprisk/signal_ratio", "poprisk/open_fraction", "eval_accuracy"):
        assert any(key in line for line in history)


def test_config_parses_and_the_command_line_wins(script):
    on_cpu = ["--config", str(RECIPE / "config.yaml"), "--use_cpu", "true", "--bf16", "false"]
    text, args = script.parse(on_cpu)
    assert (text.dataset_name, text.dataset_config) == ("nyu-mll/glue", "sst2")
    assert (args.optim, args.learning_rate) == ("poprisk_adamw", 2e-5)
    assert args.optim_args == "gate=soft,no_gate=word_embeddings"
    assert (args.save_strategy, args.eval_strategy) == ("best", "no")
    text, args = script.parse([*on_cpu, "--optim", "adamw_torch", "--wrong_labels", "0"])
    assert (args.optim, text.wrong_labels) == ("adamw_torch", 0.0)


def test_an_unknown_key_is_named(script, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("optim: poprisk_adamw\nlerning_rate: 1.0\n")
    with pytest.raises(SystemExit):
        script.parse(["--config", str(tmp_path / "mine.yaml")])
    assert "lerning_rate" in capsys.readouterr().err


def test_data_as_the_full_run_loads_them(script, monkeypatch):
    """Columns are renamed, so many labels are wrong, and those to test with are right."""
    rows = {
        "sentence": [f"text {i}" for i in range(400)],
        "y": ["no", "yes"] * 200,
        "id": [0] * 400,
    }
    asked = []

    def load_dataset(*names):
        asked.append(names)
        data = Dataset.from_dict(rows)
        return DatasetDict(train=data, validation=data, test=data.select([0]))

    monkeypatch.setattr(script, "load_dataset", load_dataset)
    args = script.TextArguments(
        dataset_name="some/data", dataset_config="part", test_split="validation",
        text_column="sentence", label_column="y", wrong_labels=0.25,
    )  # fmt: skip
    texts, names = script.load_texts(args, seed=0)
    assert asked == [("some/data", "part")]
    assert names == ["no", "yes"]
    assert set(texts["train"].column_names) == {"text", "labels"}
    right = [0, 1] * 200
    wrong = sum(a != b for a, b in zip(texts["train"]["labels"], right, strict=True))
    assert 75 <= wrong <= 125
    assert texts["test"]["labels"][:] == right


def test_model_as_the_full_run_loads_it(script, offline):
    """From a directory, as from the Hub: classes by name, a tokenizer beside."""
    texts, names = script.load_texts(script.TextArguments(), seed=0)
    model, tokenizer = script.load_model(script.TextArguments(), texts, names)
    model.save_pretrained(offline / "bert")
    tokenizer.save_pretrained(offline / "bert")
    args = script.TextArguments(model_name_or_path=str(offline / "bert"))
    loaded, again = script.load_model(args, texts, ["bad", "good"])
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    text = "well the soup was superb"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
