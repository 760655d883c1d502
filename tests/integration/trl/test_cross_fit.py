"""The mean of fold models, and folds that are kept, against what each fold was seen to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from poprisk_integrations.core.out_of_fold import MarginAverage
from poprisk_integrations.trl import cross_fit
from tests.helpers.tiny_dpo import dpo_trainer, easy_pairs, sequence_log_probs, tiny_model

FOLDS = 3


class Watch(TrainerCallback):
    """Weights, and margins of the judged pairs, after each epoch."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.weights: list[dict[str, torch.Tensor]] = []
        self.margins: list[torch.Tensor] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.model
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        found = []
        with torch.no_grad():
            for row in self.trainer.eval_dataset:
                batch = self.trainer.data_collator([row])
                policy = sequence_log_probs(model, batch)
                chosen, rejected = (policy - sequence_log_probs(tiny_model(), batch)).tolist()
                found.append(args.beta * (chosen - rejected))
        self.margins.append(torch.tensor(found, dtype=torch.float64))


class Folds:
    """Makes trainers, and knows what they did."""

    def __init__(self, root: Path, fails_at: int | None = None, **options: Any) -> None:
        self.root, self.fails_at, self.options = root, fails_at, options
        self.watched: list[Watch] = []
        self.drawn: list[float] = []

    def __call__(self, train: Any, judged: Any) -> Any:
        if len(self.watched) == self.fails_at:
            raise RuntimeError("cut")
        self.drawn.append(torch.rand(1).item())
        watch = Watch()
        watch.trainer = dpo_trainer(
            self.root / "fold", train, judged, callbacks=[watch], stop=False, noise="off",
            num_train_epochs=3, max_steps=-1, learning_rate=1e-2, per_device_train_batch_size=8,
            optim="adamw_torch", **self.options,
        )  # fmt: skip
        self.watched.append(watch)
        return watch.trainer


def fit(root: Path, data: Any, make: Folds, **options: Any) -> Any:
    return cross_fit(make, data, folds=FOLDS, directory=root, average_weights=True, **options)


def test_weights_and_margins_are_averaged_up_to_the_epoch_that_explains_labels_best(
    tmp_path: Path,
) -> None:
    data, make = easy_pairs(56), Folds(tmp_path)
    found = fit(tmp_path / "kept", data, make)
    expected: dict[str, torch.Tensor] = {}
    margins = []
    for watch, epochs in zip(make.watched, found.epochs, strict=True):
        average = MarginAverage()
        for one in watch.margins:
            average.add(one)
        assert average.best + 1 == epochs
        margins += average.margins().tolist()
        for name in watch.weights[0]:
            own = torch.stack([weights[name] for weights in watch.weights[:epochs]]).mean(0)
            expected[name] = expected.get(name, 0) + own / FOLDS
    assert sorted(found.report.to_pandas()["margin"]) == pytest.approx(sorted(margins), abs=1e-5)
    kept = load_file(found.weights)
    assert kept.keys() == expected.keys()
    for name, value in kept.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    trainer = make(data, data)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    found.load_weights(trainer)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, kept[name])
        assert not torch.equal(p, before[name])


def test_partitions_are_judges_of_their_own(tmp_path: Path) -> None:
    """Other divisions into folds: their margins and their weights are averaged."""
    data = easy_pairs(56)
    alone = [fit(tmp_path / f"{seed}", data, Folds(tmp_path), seed=seed) for seed in (0, 1)]
    make = Folds(tmp_path)
    both = fit(tmp_path / "both", data, make, partitions=2)
    assert len(make.watched) == 2 * FOLDS
    assert both.epochs == alone[0].epochs + alone[1].epochs
    tables = [found.report.to_pandas().set_index("row").sort_index() for found in (*alone, both)]
    margins = [torch.tensor(table["margin"].to_numpy()) for table in tables]
    sizes = [h.square().mean().sqrt() for h in margins[:2]]
    expected = sum(h / size for h, size in zip(margins, sizes, strict=False)) / 2 * sum(sizes) / 2
    torch.testing.assert_close(margins[2], expected, rtol=1e-5, atol=1e-6)
    for name, value in load_file(both.weights).items():
        own = torch.stack([load_file(found.weights)[name] for found in alone]).mean(0)
        torch.testing.assert_close(value, own, rtol=1e-5, atol=1e-5)


def test_a_fold_that_is_kept_is_not_trained_again(tmp_path: Path) -> None:
    data = easy_pairs(56)
    whole = fit(tmp_path / "whole", data, Folds(tmp_path))
    with pytest.raises(RuntimeError, match="cut"):
        fit(tmp_path / "cut", data, Folds(tmp_path, fails_at=1))
    again = Folds(tmp_path)
    resumed = fit(tmp_path / "cut", data, again)
    assert len(again.watched) == FOLDS - 1
    assert resumed.report.to_pandas().equals(whole.report.to_pandas())
    one, other = (load_file(found.weights) for found in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    (tmp_path / "cut" / "fold-2.safetensors").unlink()  # as if cut after the mean was written
    twice = fit(tmp_path / "cut", data, Folds(tmp_path))
    assert all(torch.equal(load_file(twice.weights)[name], other[name]) for name in other)
    for options in ({"seed": 1}, {"key": "another rate"}):  # not of these folds
        anew = Folds(tmp_path)
        fit(tmp_path / "cut", data, anew, **options)
        assert len(anew.watched) == FOLDS


def test_of_adapters_the_factors_are_averaged_one_by_one(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
    data = easy_pairs(56)
    make = Folds(tmp_path, peft_config=lora, ref_model=None)
    found = fit(tmp_path / "kept", data, make)
    assert len(set(make.drawn)) == 1  # where a model starts at random, all folds start alike
    trainer = make(data, data)
    found.load_weights(trainer)
    merged = trainer.model.merge_and_unload()
    base = tiny_model()
    name = "model.layers.0.self_attn.q_proj"
    change = merged.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")
    factors, products = [], []
    for watch, epochs in zip(make.watched, found.epochs, strict=False):
        for weights in watch.weights[:epochs]:
            a, b = (weights[f"base_model.model.{name}.lora_{k}.default.weight"] for k in "AB")
            factors.append((a / epochs / FOLDS, b / epochs / FOLDS))
            products.append(b @ a / epochs / FOLDS)
    scale = lora.lora_alpha / lora.r
    a, b = (torch.stack(own).sum(0) for own in zip(*factors, strict=True))
    torch.testing.assert_close(change.detach(), scale * (b @ a), rtol=1e-4, atol=1e-6)
    mean = scale * torch.stack(products).sum(0)  # another change, of more than two directions
    assert float((mean - change.detach()).norm() / mean.norm()) > 0.01


def test_there_is_a_partition(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid partitions: 0. Must be >= 1."):
        cross_fit(Folds(tmp_path), easy_pairs(56), folds=FOLDS, partitions=0)


def test_weights_need_a_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="average_weights: True"):
        cross_fit(Folds(tmp_path), easy_pairs(56), average_weights=True)
    with pytest.raises(ValueError, match="pass average_weights=True"):
        cross_fit(Folds(tmp_path), easy_pairs(56), folds=FOLDS).load_weights(None)
