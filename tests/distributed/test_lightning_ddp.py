"""Two gloo processes equal one process on the joined batch; all ranks stop together."""

import pytest

from poprisk_integrations import PopRiskAdamW
from tests.distributed import lightning_worker as worker
from tests.helpers.torchrun import run_scenarios
from tests.integration.lightning import toy

pytestmark = [*toy.third_party_warnings, pytest.mark.distributed]


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory):
    """Where the two processes leave their files."""
    return tmp_path_factory.mktemp("lightning_ddp")


@pytest.fixture(scope="module")
def ranks(ranks_folder):
    """All scenarios on two processes, started once: {name: [rank 0's result, rank 1's]}."""
    return run_scenarios(worker, ranks_folder)


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


def test_another_number_of_processes_is_named_and_time_goes_on(ranks, ranks_folder, tmp_path):
    settings = {"limit_train_batches": 4, "max_epochs": 10, "stop": worker.CLOSING_GATE}
    model = toy.Classifier(lambda params: PopRiskAdamW(params, lr=2e-2))
    with pytest.warns(UserWarning, match="resumed with") as caught:
        one = worker.fit(
            tmp_path, model, ckpt_path=ranks_folder / "resume-2.ckpt", world_size=1, **settings
        )
    (said,) = (str(w.message) for w in caught if "resumed with" in str(w.message))
    assert "world_size 2 -> 1, batch_size 16 -> 32" in said
    assert "window starts afresh" in said
    whole = ranks["resumed"][0]["whole"]["history"]
    assert one["history"][:2] == whole[:2]  # windows of steps 1-8 and 9-16
    assert one["history"][2]["step"] == 28  # saved at step 20
    assert one["history"][2]["lr_sum"] > whole[1]["lr_sum"]


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
    # Time of the stop: 44.3 steps of rate 1. After 37 of them, rank 1's rate is 0.6, the mean 0.8.
    assert first["global_step"] == second["global_step"] == 47
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


@pytest.mark.parametrize("name", ["fsdp1", "fsdp1_gated", "fsdp1_sampled"])
def test_fsdp1_equals_one_process(ranks, tmp_path, name):
    """Flat shards of plain tensors, some of them empty on a rank, with no gradient there."""
    one = getattr(worker, name)(tmp_path, world_size=1)
    assert one["stopped_step"] == one["global_step"] < 160
    assert_ranks_agree(ranks[name])
    assert any(rank["holds_empty_shards"] for rank in ranks[name])
    two = ranks[name][0]
    assert two["stopped_step"] == one["stopped_step"]
    assert two["onset_step"] == one["onset_step"]
    for found, expected in zip(two["history"], one["history"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert largest_difference(two["weights"], one["weights"]) < 1e-5


def test_all_ranks_cut_the_learning_rate_together(ranks, tmp_path):
    one = worker.lr_cut(tmp_path, world_size=1)
    assert one["cuts"] >= 1
    assert_ranks_agree(ranks["lr_cut"])
    for rank in ranks["lr_cut"]:
        assert (rank["cuts"], rank["last_cut_step"]) == (one["cuts"], one["last_cut_step"])


def test_fsdp2_resumes_and_says_what_is_not_saved(ranks):
    """Between windows nothing is lost; a window in progress is, and rank 0 says so."""
    assert_ranks_agree([rank["again"] for rank in ranks["fsdp2_resumed"]])
    for rank in ranks["fsdp2_resumed"]:
        toy.assert_same(rank["again"]["rule"], rank["whole"]["rule"])
        assert largest_difference(rank["again"]["weights"], rank["whole"]["weights"]) == 0.0
    assert [rank["warned"] for rank in ranks["fsdp2_resumed"]] == [True, False]


def test_ranks_with_other_amounts_of_data_agree_on_windows(ranks):
    """A window of another length on each rank would let them wait for each other for ever."""
    first, second = ranks["uneven_shards"]
    assert first == second
    # A pass over the larger shard is 18 batches; from step 80 on 9 steps.
    ends = [18, 36, 54, 72, *(80 + 9 * i for i in range(1, 5))]
    assert first["windows"] == [(end, end > 18) for end in ends]
