"""Lightning in two processes under DDP, FSDP1 and FSDP2 does what one does on the joined batches.

A scenario is a job of two ranks. Tests that compare run it once more, in this process alone.
"""

import os
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import (
    PopRiskEarlyStopping,
    PopRiskLRCut,
    PopRiskMonitor,
    PopRiskOptimizer,
)
from tests.distributed.lightning_watcher import Watcher
from tests.helpers.sharding_problem import whole, wrap_with_fsdp1
from tests.integration.lightning import toy

pytestmark = [*toy.third_party_warnings, pytest.mark.distributed]

CLOSING_GATE = {"kappa": 1.2}  # it lets little time pass
BATCH, EXAMPLES = 32, 256
BF16_EPS = torch.finfo(torch.bfloat16).eps


class SaveAt(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Model(toy.Classifier):
    def configure_model(self):
        """FSDP2: every layer's parameters are DTensors."""
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None:
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Fsdp1OnCpu(FSDPStrategy):
    """Lightning's FSDP1 asks for a GPU; on the CPU it shards as well if the device is named."""

    def _setup_model(self, model):
        return wrap_with_fsdp1(model, use_orig_params=True)


def make_strategy(name, world_size, is_sharded_checkpoint):
    gloo = {"process_group_backend": "gloo"}
    if name == "ddp":
        return DDPStrategy(**gloo)
    if name == "fsdp1":
        return Fsdp1OnCpu(**gloo)
    return ModelParallelStrategy(
        data_parallel_size=world_size,
        tensor_parallel_size=1,
        save_distributed_checkpoint=is_sharded_checkpoint,
        **gloo,
    )


def fit(
    root,
    world_size,
    make_optimizer=toy.adamw,
    callbacks=(),
    *,
    model=None,
    strategy="ddp",
    is_sharded_checkpoint=True,
    stop=None,
    shuffle=False,
    examples=EXAMPLES,
    every_step=False,
    ckpt_path=None,
    **kwargs,
):
    """One fit of 8 steps per epoch; what it left behind."""
    data, sampler = toy.noisy_data(examples, toy.FLIPS), None
    if world_size > 1:
        kwargs["strategy"] = make_strategy(strategy, world_size, is_sharded_checkpoint)
        kwargs["devices"] = world_size
        if not shuffle:
            # Lightning's own sampler would shuffle: so the ranks' batches join to one process's.
            kwargs["use_distributed_sampler"] = False
            sampler = DistributedSampler(data, world_size, int(os.environ["RANK"]), shuffle=False)
    stop = PopRiskEarlyStopping(**{"criterion": "signal", "window": 8, **(stop or {})})
    watcher, model = Watcher(every_step), model or Model(make_optimizer)
    trainer = toy.trainer(root, [stop, *callbacks, watcher], **{"max_epochs": 20, **kwargs})
    torch.manual_seed(5)
    loader = DataLoader(data, batch_size=BATCH // world_size, sampler=sampler, shuffle=shuffle)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return {
        "global_step": trainer.global_step,
        "stopped_step": stop.stopped_step,
        "onset_step": stop.onset_step,
        "best_step": stop.best_step,
        "best_model_path": stop.best_model_path,
        "reason": stop.stopping_reason,
        "rule": stop.state_dict().get("rule"),
        "history": stop.history,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        # FSDP1's are gathered while the module is still wrapped.
        "weights": watcher.at_end
        if strategy == "fsdp1"
        else {name: whole(p) for name, p in model.named_parameters()},
        "at_best": watcher.after.get(stop.best_step),
        "has_empty_shards": 0 in watcher.local_sizes,
        "optimizer": watcher.optimizer,
    }


def whole_and_resumed(root, world_size, name, step, make_optimizer=toy.adamw, make=tuple, **kwargs):
    """A run, and the same from its checkpoint; `make` gives the callbacks of each."""
    path = Path(root) / f"{name}-{world_size}.ckpt"
    run = fit(root, world_size, make_optimizer, [*make(), SaveAt(path, step)], **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = fit(root, world_size, make_optimizer, make(), ckpt_path=path, **kwargs)
    return {**run, "again": again, "said": [str(w.message) for w in caught]}


# The stop that looks at gradients.


def ddp(rank, world_size, root):
    return fit(root, world_size)


def ddp_accumulated_and_clipped(rank, world_size, root):
    """8 micro-batches by 3: the last step of an epoch is short."""
    settings = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3, "max_epochs": 40}
    return fit(root, world_size, callbacks=[PopRiskOptimizer()], stop=CLOSING_GATE, **settings)


def ddp_min_epochs(rank, world_size, root):
    return fit(root, world_size, min_epochs=10)


def ddp_onset_restored(rank, world_size, root):
    return fit(Path(root) / f"onset-{world_size}", world_size, stop={"restore": "onset"})


def gated_2e2(params):
    return PopRiskAdamW(params, lr=2e-2)


def ddp_resumed(rank, world_size, root):
    """Interrupted at the end of an epoch and in a window, and continued."""
    settings = {"limit_train_batches": 4, "max_epochs": 40, "stop": CLOSING_GATE}
    return whole_and_resumed(root, world_size, "resume", 20, gated_2e2, **settings)


class RankDependentRate(toy.Classifier):
    """A scheduler fed with a number of one rank only, e.g. a metric logged without sync_dist."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        rank = self.global_rank
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.6 if step > 36 and rank == 1 else 1.0
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def rank_dependent_rate(rank, world_size, root):
    return fit(root, world_size, model=RankDependentRate())


def overshooting(params):
    return torch.optim.SGD(params, lr=0.5, momentum=0.95)


def ddp_cut(rank, world_size, root):
    cut, stop = PopRiskLRCut(window=8), {"action": "monitor"}
    found = fit(root, world_size, overshooting, [cut], max_epochs=10, stop=stop)
    return {**found, "cuts": (cut.cuts, cut.last_cut_step)}


def uneven_shards(rank, world_size, root):
    """Each rank has data of its own, 16 and 18 batches, and both take 4 of them an epoch."""
    data = toy.noisy_data(EXAMPLES + BATCH * int(os.environ["RANK"]), toy.FLIPS)
    stop = PopRiskEarlyStopping(criterion="signal", action="monitor")
    trainer = toy.trainer(
        root,
        [stop, GradientAccumulationScheduler({0: 1, 20: 2})],
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=world_size,
        use_distributed_sampler=False,
        limit_train_batches=4,
        max_epochs=40,
    )
    trainer.fit(toy.Classifier(), DataLoader(data, batch_size=BATCH // 2, shuffle=True))
    return {"windows": [(row["step"], row["reused"]) for row in stop.history]}


def fsdp1_gated(rank, world_size, root):
    return fit(root, world_size, toy.gated, strategy="fsdp1", stop=CLOSING_GATE)


def fsdp1_sampled(rank, world_size, root):
    return fit(root, world_size, strategy="fsdp1", stop={"accumulator": "sample"})


def fsdp2_callbacks():
    return [PopRiskOptimizer(), PopRiskMonitor(1)]


def fsdp2(rank, world_size, root):
    """From a sharded checkpoint at the end of an epoch, where a window ends too."""
    settings = {"strategy": "fsdp2", "stop": CLOSING_GATE, "make": fsdp2_callbacks}
    return whole_and_resumed(root, world_size, "fsdp2", 24, **settings)


# The optimizer's states under FSDP2: 4 steps per epoch, a checkpoint at the end of the second.

SHARDED = {"strategy": "fsdp2", "examples": 128, "max_epochs": 4, "gradient_clip_val": 0.5}


def of_module(params):
    return PopRiskAdamW(params, lr=1e-2, weight_decay=0.1)


def of_callback(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def states_of_module(rank, world_size, root):
    return whole_and_resumed(root, world_size, "module", 8, of_module, **SHARDED)


def states_in_full_checkpoint(rank, world_size, root):
    settings = {**SHARDED, "is_sharded_checkpoint": False}
    return whole_and_resumed(root, world_size, "full", 8, of_module, **settings)


def states_of_callback_in_bf16(rank, world_size, root):
    settings = {**SHARDED, "precision": "bf16-true", "make": lambda: [PopRiskOptimizer()]}
    return whole_and_resumed(root, world_size, "bf16", 8, of_callback, **settings)


def states_with_sizes(rank, world_size, root):
    """The sizes are of the global batch, whatever the number of ranks."""
    sizes = {"alpha": "finite", "batch_size": BATCH, "dataset_size": SHARDED["examples"]}
    return fit(root, world_size, of_callback, [PopRiskOptimizer(**sizes)], **SHARDED)


# The stop for which examples sit out. Of 250 the sampler of two ranks has to repeat none, and that
# of their batches is uneven. With a rate of 0 nothing is learned: what is measured does not depend
# on which batch an example is in.

RISK = {"criterion": "risk", "patience": 2, "action": "stop"}
SITTING = {"examples": 250, "shuffle": True, "max_epochs": 5}


def adamw(lr):
    return lambda params: torch.optim.AdamW(params, lr=lr)


def frozen(rank, world_size, root, strategy="ddp", **settings):
    stop = {**RISK, "action": "monitor"}
    settings = {**SITTING, "strategy": strategy, **settings}
    return fit(root, world_size, adamw(0.0), stop=stop, **settings)


def frozen_and_accumulated(rank, world_size, root):
    return frozen(rank, world_size, root, accumulate_grad_batches=3)


def frozen_fsdp1(rank, world_size, root):
    return frozen(rank, world_size, root, "fsdp1")


def frozen_fsdp2(rank, world_size, root):
    return frozen(rank, world_size, root, "fsdp2")


def risk_resumed(rank, world_size, root):
    settings = {**SITTING, "stop": {**RISK, "action": "monitor"}}
    return whole_and_resumed(root, world_size, "risk", 24, adamw(1e-2), **settings)


def risk_stopped(rank, world_size, root, strategy="ddp", action="stop"):
    settings = {**SITTING, "max_epochs": 60, "strategy": strategy}
    root = Path(root) / f"risk-{strategy}-{action}-{world_size}"
    stop = {**RISK, "action": action}
    return fit(root, world_size, adamw(3e-2), stop=stop, every_step=True, **settings)


def risk_stopped_fsdp2(rank, world_size, root):
    return risk_stopped(rank, world_size, root, "fsdp2")


def risk_annealed_fsdp2(rank, world_size, root):
    return risk_stopped(rank, world_size, root, "fsdp2", None)


ONE_STOPS = (ddp, ddp_accumulated_and_clipped, ddp_min_epochs, fsdp2, fsdp1_gated, fsdp1_sampled)
STATES = (states_of_module, states_in_full_checkpoint, states_of_callback_in_bf16)
FROZEN = (frozen_and_accumulated, frozen_fsdp1, frozen_fsdp2)
RISK_STOPS = (risk_stopped, risk_stopped_fsdp2, risk_annealed_fsdp2)
OTHERS = (ddp_onset_restored, ddp_resumed, rank_dependent_rate, ddp_cut, uneven_shards)
SCENARIOS = (*ONE_STOPS, *OTHERS, *STATES, states_with_sizes, *FROZEN, risk_resumed, *RISK_STOPS)


JOBS = {2: SCENARIOS}


@pytest.fixture
def two(results):
    """`two(scenario)` is what each rank found."""
    return lambda scenario: results(2, scenario)


def largest_difference(left, right):
    """Of any tensor, in units of its largest entry."""
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max() / right[k].abs().max()) for k in left)


def assert_ranks_agree(ranks):
    first, second = ranks
    for key in ("reason", "global_step", "stopped_step", "best_step", "rule", "history"):
        toy.assert_same(first[key], second[key])
    toy.assert_same(first["weights"], second["weights"])


def assert_same_history(found, expected):
    for row, other in zip(found, expected, strict=True):
        assert {k for k in row if row[k] is None} == {k for k in other if other[k] is None}
        known = {key: value for key, value in other.items() if value is not None}
        assert {key: row[key] for key in known} == pytest.approx(known, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("scenario", ONE_STOPS, ids=lambda s: s.__name__)
def test_two_processes_stop_as_one(two, tmp_path, scenario):
    ranks, one = two(scenario), scenario(0, 1, tmp_path)
    assert_ranks_agree(ranks)
    assert one["stopped_step"] == one["global_step"] < 160
    for rank in ranks:
        for key in ("global_step", "stopped_step", "onset_step"):
            assert rank[key] == one[key], key
        assert_same_history(rank["history"], one["history"])
        assert largest_difference(rank["weights"], one["weights"]) < 1e-5
    gate = {k: v for k, v in one["metrics"].items() if "gate" in k or "open_fraction" in k}
    assert {key: ranks[0]["metrics"][key] for key in gate} == pytest.approx(gate, rel=1e-3)
    assert bool(gate) == (scenario is fsdp2)
    # FSDP1's shards are plain tensors, some of them empty on a rank, with no gradient there.
    is_fsdp1 = scenario in (fsdp1_gated, fsdp1_sampled)
    assert any(rank["has_empty_shards"] for rank in ranks) == is_fsdp1


@pytest.mark.parametrize(
    "scenario", [ddp_resumed, fsdp2, *STATES, risk_resumed], ids=lambda s: s.__name__
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(two, scenario):
    ranks = two(scenario)
    assert_ranks_agree([rank["again"] for rank in ranks])
    for rank in ranks:
        for key in ("weights", "optimizer", "stopped_step"):
            toy.assert_same(rank["again"][key], rank[key])
        if scenario in (ddp_resumed, fsdp2, risk_resumed):
            for key in ("rule", "reason"):
                toy.assert_same(rank["again"][key], rank[key])
    if scenario in (ddp_resumed, risk_resumed):
        toy.assert_same(ranks[0]["again"]["history"], ranks[0]["history"])
    if scenario is fsdp2:  # a window in progress is not saved, and rank 0 says so
        warned = [any("starts afresh" in text for text in rank["said"]) for rank in ranks]
        assert warned == [True, False]


def test_another_number_of_processes_is_named_and_time_goes_on(two, folder, tmp_path):
    whole = two(ddp_resumed)[0]["history"]
    settings = {"limit_train_batches": 4, "max_epochs": 10, "stop": CLOSING_GATE}
    path = Path(folder) / "resume-2.ckpt"
    with pytest.warns(UserWarning, match="resumed with") as caught:
        one = fit(tmp_path, 1, gated_2e2, ckpt_path=path, **settings)
    (said,) = (str(w.message) for w in caught if "resumed with" in str(w.message))
    assert "world_size 2 -> 1, batch_size 16 -> 32" in said
    assert "window starts afresh" in said
    assert one["history"][:2] == whole[:2]  # windows of steps 1-8 and 9-16
    assert one["history"][2]["step"] == 28  # saved at step 20
    assert one["history"][2]["lr_sum"] > whole[1]["lr_sum"]


def test_the_onset_is_restored_on_all_ranks(two, tmp_path):
    one = ddp_onset_restored(0, 1, tmp_path)
    assert_ranks_agree(two(ddp_onset_restored))
    weights = two(ddp_onset_restored)[0]["weights"]
    assert largest_difference(weights, one["weights"]) < 1e-5
    assert largest_difference(weights, two(ddp)[0]["weights"]) > 1e-3


def test_ranks_with_different_learning_rates_stop_together(two):
    """Their training times differ; the mean decides, between what each alone would say."""
    first, second = two(rank_dependent_rate)
    assert first["reason"] == second["reason"]
    # Time of the stop: 44.3 steps of rate 1. After 37 of them, rank 1's rate is 0.6, the mean 0.8.
    assert first["global_step"] == second["global_step"] == 47
    assert first["rule"]["lr_sum"] == second["rule"]["lr_sum"]
    assert first["metrics"]["poprisk/onset_step"] == second["metrics"]["poprisk/onset_step"]


def test_all_ranks_cut_the_learning_rate_together(two, tmp_path):
    one = ddp_cut(0, 1, tmp_path)
    assert one["cuts"][0] >= 1
    assert_ranks_agree(two(ddp_cut))
    assert [rank["cuts"] for rank in two(ddp_cut)] == [one["cuts"]] * 2


def test_ranks_with_other_amounts_of_data_agree_on_windows(two):
    """A window of another length on each rank would let them wait for each other for ever."""
    first, second = two(uneven_shards)
    assert first == second
    # A pass over the larger shard is 18 batches; from step 80 on 9 steps.
    ends = [18, 36, 54, 72, *(80 + 9 * i for i in range(1, 5))]
    assert first["windows"] == [(end, end > 18) for end in ends]


@pytest.mark.parametrize("scenario", [*STATES, states_with_sizes], ids=lambda s: s.__name__)
def test_sharded_states_are_those_of_one_process(two, tmp_path, scenario):
    one, is_bf16 = scenario(0, 1, tmp_path), scenario is states_of_callback_in_bf16
    assert one["optimizer"]["is_sharded"] == {False}
    for rank in two(scenario):
        found, expected = rank["optimizer"], one["optimizer"]
        assert found["type"] == expected["type"] == "PopRiskAdamW"
        assert found["counts"] == expected["counts"] == {16.0}
        assert found["sizes"] == expected["sizes"]
        assert found["is_sharded"] == {True}
        parameters = torch.bfloat16 if is_bf16 else torch.float32
        assert found["dtypes"] == {(parameters, torch.float32)}
        # In bfloat16, the mean of two gradients is not the gradient of the mean.
        bounds = (4 * BF16_EPS, 8 * BF16_EPS) if is_bf16 else (1e-5, 1e-5)
        assert largest_difference(rank["weights"], one["weights"]) < bounds[0]
        assert largest_difference(found["squares"], expected["squares"]) < bounds[1]
    if scenario is states_with_sizes:
        assert found["sizes"] == {(BATCH, SHARDED["examples"])}
        assert largest_difference(rank["weights"], two(states_of_module)[0]["weights"]) > 1e-3


@pytest.mark.parametrize("scenario", FROZEN, ids=lambda s: s.__name__)
def test_two_processes_estimate_the_test_loss_as_one(two, tmp_path, scenario):
    ranks, one = two(scenario), scenario(0, 1, tmp_path)
    assert_ranks_agree(ranks)
    history = ranks[0]["history"]
    assert [row["step"] for row in history] == [row["step"] for row in one["history"]]
    for found, expected in zip(history, one["history"], strict=True):
        for key in ("train_loss", "train_loss_se", "train_accuracy"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6)
        # Where in the epoch an example is measured depends on its rank, and is corrected for.
        difference = found["estimated_test_loss"] - expected["estimated_test_loss"]
        assert abs(difference) < 0.5 * expected["estimated_test_loss_se"]
    first, expected = history[0], one["history"][0]
    assert first["estimated_test_loss"] == pytest.approx(expected["estimated_test_loss"], rel=1e-6)


@pytest.mark.parametrize("scenario", RISK_STOPS, ids=lambda s: s.__name__)
def test_all_ranks_stop_together_with_the_best_weights(two, scenario):
    ranks = two(scenario)
    assert_ranks_agree(ranks)
    first = ranks[0]
    assert 0 < first["best_step"] < first["stopped_step"] == first["global_step"] < 60 * 8
    if scenario is risk_stopped:
        assert f"poprisk-best-step={first['best_step']}.ckpt" in first["best_model_path"]
    if scenario is not risk_annealed_fsdp2:  # under FSDP2 from each process's own copy
        for rank in ranks:
            toy.assert_same(rank["weights"], rank["at_best"])


def test_fsdp1_needs_a_gpu(tmp_path):
    """A canary: the day Lightning runs FSDP1 on the CPU, `Fsdp1OnCpu` can go."""
    with pytest.raises(ValueError, match="`fsdp` requires a GPU accelerator"):
        toy.trainer(tmp_path, strategy=FSDPStrategy())
