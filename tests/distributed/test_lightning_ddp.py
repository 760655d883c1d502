"""Two gloo processes equal one process on the joined batch; all ranks stop together."""

import pytest

from tests.distributed import lightning_worker as worker
from tests.helpers.torchrun import run_scenarios
from tests.integration.lightning import toy

pytestmark = [*toy.third_party_warnings, pytest.mark.distributed]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """All scenarios on two processes, started once: {name: [rank 0's result, rank 1's]}."""
    return run_scenarios(worker, tmp_path_factory.mktemp("lightning_ddp"))


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left)


def assert_ranks_agree(results):
    first, second = results
    assert first["reason"] == second["reason"]
    assert first["global_step"] == second["global_step"]
    assert first["rule"] == second["rule"]
    assert largest_difference(first["weights"], second["weights"]) == 0.0


@pytest.mark.parametrize("name", ["adamw", "gated", "accumulated_and_clipped", "min_epochs"])
def test_two_processes_equal_one_on_the_joined_batch(ranks, tmp_path, name):
    one = getattr(worker, name)(tmp_path, world_size=1)
    assert one["stopped_step"] == one["global_step"]
    assert_ranks_agree(ranks[name])
    for two in ranks[name]:
        assert two["global_step"] == two["stopped_step"] == one["stopped_step"]
        assert two["onset_step"] == one["onset_step"]
        assert two["rule"]["signal_ratio"] == pytest.approx(one["rule"]["signal_ratio"], rel=1e-4)
        assert largest_difference(two["weights"], one["weights"]) < 1e-6


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(ranks):
    for rank in ranks["resumed"]:
        assert rank["whole"]["stopped_step"] is not None
        toy.assert_same(rank["again"], rank["whole"])
    assert_ranks_agree([rank["again"] for rank in ranks["resumed"]])


def test_the_onset_is_restored_on_all_ranks(ranks, tmp_path):
    one = worker.onset_restored(tmp_path, world_size=1)
    assert_ranks_agree(ranks["onset_restored"])
    two = ranks["onset_restored"][0]
    assert largest_difference(two["weights"], one["weights"]) < 1e-6
    assert largest_difference(two["weights"], ranks["adamw"][0]["weights"]) > 1e-3


def test_ranks_with_different_learning_rates_stop_together(ranks):
    """Their training times differ; the mean decides, between what each alone would say."""
    first, second = ranks["rank_dependent_rate"]
    assert first["reason"] == second["reason"]
    assert first["global_step"] == second["global_step"] == 71
    assert first["rule"]["lr_sum"] == second["rule"]["lr_sum"]
    assert first["metrics"]["poprisk/onset_step"] == second["metrics"]["poprisk/onset_step"]


def test_fsdp2_equals_one_process(ranks, tmp_path):
    one = worker.fsdp2(tmp_path, world_size=1)
    assert_ranks_agree(ranks["fsdp2"])
    two = ranks["fsdp2"][0]
    assert two["stopped_step"] == one["stopped_step"]
    assert two["rule"]["signal_ratio"] == pytest.approx(one["rule"]["signal_ratio"], rel=1e-4)
    assert largest_difference(two["weights"], one["weights"]) < 1e-6
    for name in ("open_fraction", "mean_gate", "update_norm_ratio", "closed_noise"):
        key = f"poprisk/{name}"
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-3)


def test_fsdp2_resumes_and_says_what_is_not_saved(ranks):
    """Between windows nothing is lost; a window in progress is, and rank 0 says so."""
    assert_ranks_agree([rank["again"] for rank in ranks["fsdp2_resumed"]])
    for rank in ranks["fsdp2_resumed"]:
        toy.assert_same(rank["again"]["rule"], rank["whole"]["rule"])
        assert largest_difference(rank["again"]["weights"], rank["whole"]["weights"]) == 0.0
    assert [rank["warned"] for rank in ranks["fsdp2_resumed"]] == [True, False]
