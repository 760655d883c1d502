"""alpha=finite: the batch is counted in examples, over ranks that see different ones."""

from types import SimpleNamespace

import pytest
from accelerate.utils import ParallelismConfig
from transformers import Trainer

from poprisk_integrations.huggingface.run_facts import global_batch_size
from tests.helpers.tiny_trainer import TinyModel, arguments


def _arguments(world_size, layout=None, split_batches=False):
    return SimpleNamespace(
        world_size=world_size,
        train_batch_size=3,
        gradient_accumulation_steps=5,
        parallelism_config=layout,
        accelerator_config=SimpleNamespace(split_batches=split_batches),
    )


def _layout(tp=1, cp=1, sp=1):
    return SimpleNamespace(tp_size=tp, cp_size=cp, sp_size=sp)


@pytest.mark.parametrize(
    ("layout", "replicas"),
    [
        (None, 8),
        (_layout(), 8),
        (_layout(tp=2), 4),
        (_layout(cp=4), 2),
        (_layout(tp=2, sp=4), 1),
    ],
)
def test_ranks_that_share_examples_count_once(layout, replicas):
    assert global_batch_size(_arguments(8, layout)) == 3 * 5 * replicas
    accelerator = SimpleNamespace(parallelism_config=layout)
    assert global_batch_size(_arguments(8), accelerator) == 3 * 5 * replicas


def test_split_batches_are_one_batch():
    """Of two ranks with batches of 8, each gets 4 examples; Trainer's own count says 16."""
    assert global_batch_size(_arguments(8, split_batches=True)) == 3 * 5


def test_agrees_with_trainer(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    trainer = Trainer(TinyModel(), args)
    assert global_batch_size(args, trainer.accelerator) == trainer.get_total_train_batch_size(args)
    layout = ParallelismConfig(tp_size=2, dp_shard_size=4)
    assert global_batch_size(_arguments(8, layout)) == 3 * 5 * 4
