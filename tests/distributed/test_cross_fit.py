"""`cross_fit` in two processes, sharded too: margins, report and mean of the models are one's."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from poprisk_integrations.trl import cross_fit
from tests.distributed.sharded_trainer import gloo_is_an_accelerator, whole_weights
from tests.distributed.test_trainer import settings
from tests.helpers.gloo import spawn_gloo
from tests.helpers.tiny_dpo import dpo_trainer, easy_pairs, save_model

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def fit(root, model, options, world_size):
    """Two folds of 60 pairs; the weights of a trainer that has loaded the mean."""

    def make_trainer(train, judged):
        return dpo_trainer(
            Path(root, "fold"), train, judged, model=model, ref_model=None, stop=False,
            noise="off", num_train_epochs=2, max_steps=-1, learning_rate=0.3, optim="sgd",
            per_device_train_batch_size=6 // world_size, per_device_eval_batch_size=4, **options,
        )  # fmt: skip

    data = easy_pairs(60)
    found = cross_fit(
        make_trainer, data, folds=2, directory=Path(root, "kept"), average_weights=True
    )
    trainer = make_trainer(data, data)
    found.load_weights(trainer)
    trainer.save_model(Path(root, "final"))
    table = found.report.to_pandas().sort_values("row")
    return {
        "rows": table["row"].tolist(),
        "margins": table["margin"].tolist(),
        "epochs": found.epochs,
        "mean": {name: value.clone() for name, value in load_file(found.weights).items()},
        "loaded": whole_weights(trainer.model),
    }


def in_a_process(rank, world_size, strategy, model, folder):
    with gloo_is_an_accelerator(strategy):
        return fit(folder, model, settings(strategy), world_size)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Loaded from a path, as users do: ZeRO 3 then parts it before it is whole anywhere."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("one"), model, {}, 1)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero3", marks=[pytest.mark.slow, needs_deepspeed]),
    ],
)
def test_two_processes_find_what_one_finds(strategy, model, alone, tmp_path):
    first, second = spawn_gloo(2, in_a_process, strategy, model, str(tmp_path))
    for found in (first, second):
        assert found["rows"] == alone["rows"] == list(range(60))
        assert found["epochs"] == alone["epochs"]
        assert found["margins"] == pytest.approx(alone["margins"], abs=1e-3)
        assert found["mean"].keys() == found["loaded"].keys() == alone["mean"].keys()
        for name, value in alone["mean"].items():
            torch.testing.assert_close(found["mean"][name], value, rtol=1e-3, atol=1e-4)
            assert torch.equal(found["loaded"][name], found["mean"][name])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    for name, value in first["mean"].items():
        assert torch.equal(saved[name], value)
    assert max(map(abs, alone["margins"])) > 0.05  # the models have moved
