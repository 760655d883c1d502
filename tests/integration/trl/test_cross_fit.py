"""The mean of fold models, and folds that are kept, against what each fold was seen to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
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

    def __init__(self, root: Path, fails_at: int | None = None) -> None:
        self.root, self.fails_at = root, fails_at
        self.watched: list[Watch] = []

    def __call__(self, train: Any, judged: Any) -> Any:
        if len(self.watched) == self.fails_at:
            raise RuntimeError("cut")
        watch = Watch()
        watch.trainer = dpo_trainer(
            self.root / "fold", train, judged, callbacks=[watch], stop=False, noise="off",
            num_train_epochs=3, max_steps=-1, learning_rate=1e-2, per_device_train_batch_size=8,
            optim="adamw_torch",
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


def test_weights_need_a_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="average_weights: True"):
        cross_fit(Folds(tmp_path), easy_pairs(56), average_weights=True)
    with pytest.raises(ValueError, match="pass average_weights=True"):
        cross_fit(Folds(tmp_path), easy_pairs(56), folds=FOLDS).load_weights(None)
