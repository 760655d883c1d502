"""PopRiskAdamW under Lightning's FSDP2, from the module and from the callback."""

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from tests.distributed import lightning_sharded_worker as worker
from tests.helpers.torchrun import run_scenarios
from tests.integration.lightning import toy

pytestmark = [*toy.third_party_warnings, pytest.mark.distributed]

RESUMED = [s.__name__ for s in worker.SCENARIOS if s is not worker.finite]
BF16_EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """All scenarios on two processes, started once: {name: [rank 0's result, rank 1's]}."""
    return run_scenarios(worker, tmp_path_factory.mktemp("lightning_sharded"))


def relative_difference(left, right):
    """Largest difference of any tensor, in units of its largest entry."""
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max() / right[k].abs().max()) for k in left)


@pytest.mark.parametrize("name", [s.__name__ for s in worker.SCENARIOS])
def test_two_processes_equal_one_on_the_joined_batch(ranks, tmp_path, name):
    one = getattr(worker, name)(tmp_path, world_size=1)["whole"]
    is_bf16 = name.endswith("bf16")
    assert not any(one["sharded"])
    for two in (rank["whole"] for rank in ranks[name]):
        assert two["optimizer"] == "PopRiskAdamW"
        assert two["global_step"] == one["global_step"] == 16
        assert two["steps"] == one["steps"] == {16.0}
        assert two["dev_steps"] == one["dev_steps"] == {15.0}
        assert all(two["sharded"])
        parameters = torch.bfloat16 if is_bf16 else torch.float32
        assert two["dtypes"] == {(parameters, torch.float32)}
        # In bfloat16, the mean of two gradients is not the gradient of the mean.
        assert relative_difference(two["weights"], one["weights"]) < (
            4 * BF16_EPS if is_bf16 else 1e-5
        )
        assert relative_difference(two["noise"], one["noise"]) < (8 * BF16_EPS if is_bf16 else 1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(ranks, name):
    first, second = ranks[name]
    toy.assert_same(first, second)
    for rank in ranks[name]:
        toy.assert_same(rank["resumed"], rank["whole"])


def test_module_and_callback_train_alike(ranks):
    for precision in ("32", "bf16"):
        module, callback = ranks[f"module_{precision}"][0], ranks[f"callback_{precision}"][0]
        toy.assert_same(callback["whole"], module["whole"])


def test_finite_alpha_keeps_the_sizes_of_the_global_batch(ranks):
    for rank in ranks["finite"]:
        assert rank["whole"]["sizes"] == {(worker.BATCH, worker.EXAMPLES)}
    other = ranks["callback_32"][0]["whole"]["weights"]
    assert relative_difference(ranks["finite"][0]["whole"]["weights"], other) > 1e-3


def test_fsdp1_needs_a_gpu(tmp_path):
    """A canary: the day Lightning runs FSDP1 on the CPU, this test fails and gets a body."""
    with pytest.raises(ValueError, match="`fsdp` requires a GPU accelerator"):
        toy.trainer(tmp_path, strategy=FSDPStrategy())
    pytest.skip(
        "Lightning's FSDP1 needs a GPU (accelerator_connector._check_strategy_and_fallback); the "
        "optimizer is tested under torch's in test_fsdp1"
    )
