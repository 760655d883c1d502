"""What earlier code trained, reported, refused and saved, this code does too.

`tests/goldens/dpo` was written by running this file as a script, with the package as it was before
its modules were merged: runs of twelve steps, a checkpoint, and the messages of bad arguments.
"""

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from tests.helpers.tiny_dpo import config_options, easy_pairs, pairs, tiny_tokenizer

GOLDENS = Path(__file__).parents[2] / "goldens" / "dpo"
INPUTS = (
    "model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "poprisk_labels.safetensors", "poprisk_window.safetensors",
)  # fmt: skip

MODES: dict[str, dict[str, Any]] = {
    "off": {},
    "cdpo": {"noise_rate": 0.25},
    "rdpo": {"noise_rate": 0.25},
    "holder": {},
    "weights": {"noise_rate": 0.25},
    "auto": {},
}
RESUMED = {
    "stop": True, "stop_criterion": "signal", "stop_action": "monitor", "max_steps": 24,
    "save_steps": 7,
}  # fmt: skip


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=15, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.1,
            pad_token_id=1, eos_token_id=2, bos_token_id=None,
        )
    )  # fmt: skip


def noisy() -> Dataset:
    """Sixty pairs, one epoch of twelve steps; every fourth label is wrong."""
    rows = [dict(row) for row in easy_pairs(60)]
    for row in rows[::4]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    ids = [f"pair-{number}" for number in range(60)]
    return Dataset.from_list(rows).add_column("id", ids)


def trained(folder: Path, *, resume: str | None = None, **options: Any) -> dict[str, Any]:
    settings = {
        "stop": False, "max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 5,
        "beta": 0.5, "pair_id_column": "id", "save_strategy": "steps", "save_steps": 100,
        "optim_args": "noise_source=temporal",  # the default of then
    }  # fmt: skip
    trainer = PopRiskDPOTrainer(
        model(0),
        model(0),
        PopRiskDPOConfig(**config_options(folder, **{**settings, **options})),
        train_dataset=noisy(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=resume)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    table = trainer.flip_report().to_pandas().sort_values("row")
    windows = []
    if options.get("stop"):
        windows = [row["signal_ratio"] for row in trainer.callback_handler.callbacks[-1].history]
    return {
        "loss": [line["loss"] for line in lines],
        "margin_p50": [line["poprisk/margin_p50"] for line in lines],
        "parameters": {
            name: [float(p.detach().sum()), float(p.detach().abs().sum())]
            for name, p in trainer.model.named_parameters()
        },
        "signal_ratio": windows,
        "noise": json.loads((folder / "poprisk_noise.json").read_text()),
        "report": {
            name: [None if value != value else value for value in table[name].tolist()]
            for name in ("pair_id", "probability_wrong", "margin", "step", "action")
        },
    }


def refused(case: str) -> str:
    """The error: of the config alone, or of the trainer with data, whose model does not exist.

    A case is a key of `messages.json`: "config OPTIONS", "data COLUMNS OPTIONS", "stream OPTIONS".
    """
    kind, _, rest = case.partition(" ")
    columns, _, rest = rest.rpartition(" {") if kind == "data" else ("", "", rest[1:])
    values, options = (eval(text or "{}", {"nan": math.nan, "inf": math.inf})
                       for text in (columns, "{" + rest))  # fmt: skip
    options = {"output_dir": "never_made", "use_cpu": True, "bf16": False, **options}
    data: Any = Dataset.from_dict(values)
    if kind == "stream":
        data, options["max_steps"] = pairs().to_iterable_dataset(), 1
    try:
        args = PopRiskDPOConfig(**options)
        if kind != "config":
            PopRiskDPOTrainer("no/such-model", args=args, train_dataset=data)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def golden(name: str) -> Any:
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """Equal, numbers up to the rounding of another processor."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{place}/{index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), place
    elif place.endswith("diagnosis"):
        assert isinstance(found, str)
    else:
        assert found == expected, place


@pytest.mark.parametrize("mode", MODES)
def test_twelve_steps(tmp_path: Path, mode: str) -> None:
    assert_same(trained(tmp_path, noise=mode, **MODES[mode]), golden("runs.json")[mode])


def test_a_checkpoint_of_earlier_code_resumes(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(GOLDENS / "checkpoint-7", tmp_path / "checkpoint-7")
    found = trained(tmp_path, resume=str(checkpoint), **RESUMED)
    assert_same(found, golden("resumed.json"))


@pytest.mark.parametrize("case", golden("messages.json"))
def test_bad_arguments_have_the_same_words(case: str) -> None:
    message, expected = refused(case), golden("messages.json")[case]
    if "'stop_" in case:  # the rule is in the words of the stop, the name in those of this config
        message, expected = (text.partition(". ")[0] for text in (message, expected))
    assert message == expected
    assert not Path("never_made").exists()


def main() -> None:
    torch.set_num_threads(1)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode, options in MODES.items():
            runs[mode] = trained(Path(folder, mode), noise=mode, **options)
        resumed = trained(Path(folder, "resumed"), **RESUMED)
        target = GOLDENS / "checkpoint-7"
        target.mkdir(parents=True, exist_ok=True)
        for name in INPUTS:
            source = Path(folder, "resumed", "checkpoint-7", name)
            if source.exists():
                shutil.copy(source, target)
    messages = {case: refused(case) for case in golden("messages.json")}
    for name, content in (("runs", runs), ("resumed", resumed), ("messages", messages)):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (GOLDENS / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    print(sys.modules["poprisk_integrations"].__file__)


if __name__ == "__main__":
    main()
