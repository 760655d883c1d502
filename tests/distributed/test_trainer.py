"""Trainer in two processes under DDP, FSDP and ZeRO does what one does on the joined batches.

Every strategy makes the same runs: the optimizer and the stop that looks at gradients on a noisy
regression, and the stop for which examples sit out on a classification. Under FSDP1, which Trainer
refuses on the CPU, the stop is driven by hand.
"""

import contextlib
import importlib.util
import io
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import poprisk_integrations.huggingface as hf
from poprisk_integrations.core.sit_out_schedule import first_epochs
from poprisk_integrations.huggingface.run_facts import remember_norm
from tests.distributed.sharded_trainer import (
    gloo_is_an_accelerator,
    held,
    innermost,
    whole_weights,
)
from tests.helpers import sharding_problem, tiny_classifier, tiny_trainer
from tests.helpers.gloo import spawn_gloo
from tests.helpers.trainer_events import EventSequence

pytestmark = pytest.mark.distributed

DEFAULT = ("ddp", "fsdp2", "zero2", "zero3")  # zero last: what it sets stays on
SLOW = ("fsdp2_sharded_checkpoint", "zero1", "zero3_offload")
ON_CPU = "fsdp2_asked_for_on_cpu"  # Trainer's own choice there, with nothing pretended
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero": "DEEPSPEED"}

BATCH, EXAMPLES, WINDOW = 8, tiny_trainer.EXAMPLES, 4
RISK_EXAMPLES, RISK_BATCH, RISK_EPOCHS, RISK_MIDDLE = 128, 16, 3, 13
RISK_STEPS = RISK_EXAMPLES // RISK_BATCH  # of an epoch


class Regression(tiny_trainer.TinyModel):
    """Names a class of modules to shard on its own, as models of transformers do."""

    _no_split_modules = ("LayerNorm",)


class Classification(tiny_classifier.Classifier):
    _no_split_modules = ("Linear",)


def settings(strategy):
    """What a user sets for this strategy."""
    if strategy == "ddp":
        return {"ddp_backend": "gloo"}
    if strategy.startswith("fsdp"):
        config = {"version": 2, "cpu_ram_efficient_loading": False}
        if strategy == "fsdp2_sharded_checkpoint":
            config["state_dict_type"] = "SHARDED_STATE_DICT"
        options = {"fsdp": True, "fsdp_config": config, "ddp_backend": "gloo"}
        return {**options, "use_cpu": strategy == ON_CPU}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(strategy[4])},
    }
    if strategy.endswith("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return {"use_cpu": False, "deepspeed": config}


def middle(strategy):
    """Of a window; of shards a window in progress is not saved."""
    return 22 if strategy in ("ddp", "one") else 24


def regression(out, world_size, accumulation=1, resume=None, **changes):
    """Weight decay, and two windows per epoch: the gated run stops at step 40."""
    args = tiny_trainer.arguments(
        out,
        per_device_train_batch_size=BATCH // world_size // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=8,
        weight_decay=0.1,
        **changes,
    )
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=WINDOW)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        trainer = tiny_trainer.train(args, stop, model=Regression(), resume=resume)
    optimizer = innermost(trainer.optimizer)
    states = list(optimizer.state.values())
    return {
        "optimizer": type(optimizer).__name__,
        "kind": trainer.accelerator.distributed_type.value,
        "world_size": args.world_size,
        "steps": trainer.state.global_step,
        "best": trainer.state.best_global_step,
        "weights": whole_weights(trainer.model_wrapped),
        "counts": {float(s["step"]) for s in states},
        "held": held(optimizer),
        "sizes": {(g.get("batch_size"), g.get("dataset_size")) for g in optimizer.param_groups},
        "stop": stop.stopping_state,
        "history": stop.history,
        "clipped": trainer.state.log_history[-1].get("poprisk/clipped_fraction"),
        "said": said.getvalue(),
    }


def classification(out, world_size, accumulation=1, resume=None, **changes):
    args = tiny_classifier.arguments(
        out,
        per_device_train_batch_size=RISK_BATCH // world_size // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=RISK_EPOCHS,
        **changes,
    )
    model, data = Classification(), tiny_classifier.dataset(RISK_EXAMPLES)
    stop = hf.PopRiskEarlyStoppingCallback(sit_out=0.25, action="monitor")
    trainer = tiny_classifier.train(args, stop, model=model, train_dataset=data, resume=resume)
    return {
        "steps": trainer.state.global_step,
        "criterion": stop.criterion_in_use,
        "history": stop.history,
        "visitors": [entry.indices for entry in model.seen if entry.trains],
        "sitters": [entry.indices for entry in model.seen[1:] if not entry.trains],
    }


def run_all(strategy, folder, world_size=1, **options):
    """{name: what a run found}."""
    out, cut = Path(folder, strategy), middle(strategy)
    gated = {"optim_args": "alpha=0.02", "max_grad_norm": 0.5, **options}
    gated |= {"save_strategy": "steps", "save_steps": cut}
    plain = {"optim": "adamw_torch", "max_grad_norm": 0.0, "max_steps": 12, "accumulation": 2}
    finite = {"optim_args": "alpha=finite", "max_steps": 4, "accumulation": 2}
    moving = {"learning_rate": 1e-2, "accumulation": 2, **options}
    moving |= {"save_strategy": "steps", "save_steps": RISK_MIDDLE}
    kept, kept_risk = f"{out}/gated/checkpoint-{cut}", f"{out}/moving/checkpoint-{RISK_MIDDLE}"
    found = {
        "gated": regression(out / "gated", world_size, **gated),
        "gated again": regression(out / "again", world_size, resume=kept, **gated),
        "plain": regression(out / "plain", world_size, **plain, **options),
        "finite": regression(out / "finite", world_size, **finite, **options),
        # With a rate of 0 the losses of one process and of two are those of the same weights.
        "frozen": classification(out / "frozen", world_size, learning_rate=0.0, **options),
        "moving": classification(out / "moving", world_size, **moving),
        "moving again": classification(out / "again", world_size, resume=kept_risk, **moving),
    }
    if strategy == "ddp":
        alone = f"{folder}/one/gated/checkpoint-{cut}"
        found["grown"] = regression(out / "grown", world_size, resume=alone, **gated)
    return found


FSDP1 = {"original parameters": True, "flat parameters": False}
CLIP = 0.05


def by_hand(model, rows, clip, world_size, folder):
    """Four windows of the stop, with the events of Trainer; what it measured."""
    args = SimpleNamespace(
        device="cpu",
        world_size=world_size,
        train_batch_size=sharding_problem.BATCH // world_size,
        n_gpu=0,
        gradient_accumulation_steps=1,
        max_grad_norm=CLIP,
        fsdp="full_shard",
        output_dir=folder,
        logging_strategy="steps",
        save_strategy="no",
        eval_strategy="no",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stop = hf.PopRiskEarlyStoppingCallback(
        criterion="signal", window=6, epoch_steps=8, action="monitor"
    )
    events = EventSequence(stop, optimizer, args, model=model)
    for x, y in sharding_problem.batches(24):
        torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        remember_norm(events.state, clip(CLIP))  # as Trainer's own clipping does
        events.step()
        optimizer.zero_grad()
    return {"history": stop.history, "state": stop.stopping_state}


def run_strategies(rank, world_size, names, folder):
    """{strategy: its runs}."""
    found, rows = {"fsdp1": {}}, sharding_problem.share(rank, world_size)
    for kind, use_orig_params in FSDP1.items():
        model = sharding_problem.make_model()
        model = sharding_problem.wrap_with_fsdp1(model, use_orig_params)
        found["fsdp1"][kind] = by_hand(model, rows, model.clip_grad_norm_, world_size, folder)
    for name in names:
        with contextlib.nullcontext() if name == ON_CPU else gloo_is_an_accelerator(name):
            found[name] = run_all(name, folder, world_size, **settings(name))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def one(folder):
    """The same runs in one process on the joined batches."""
    torch.manual_seed(0)
    return run_all("one", folder)


@pytest.fixture(scope="module")
def two(folder, one):
    """`two(strategy, run)` is what each rank found; one start serves the default run."""
    found = {}

    def look_up(strategy, run):
        together = [s for s in DEFAULT if HAS_DEEPSPEED or not s.startswith("zero")]
        names = [strategy] if strategy in (*SLOW, ON_CPU) else together
        if strategy not in found:
            try:
                ranks = spawn_gloo(2, run_strategies, names, folder)
                found.update({name: [rank[name] for rank in ranks] for name in ranks[0]})
            except Exception as error:  # once is enough: every test shows it
                found.update(dict.fromkeys(["fsdp1", *names], error))
        if isinstance(found[strategy], Exception):
            raise found[strategy]
        return [rank[run] for rank in found[strategy]]

    return look_up


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED, reason="DeepSpeed is not installed (it is in the test extra)"
)
EACH_STRATEGY = pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(
            name,
            marks=[needs_deepspeed] * name.startswith("zero") + [pytest.mark.slow] * (name in SLOW),
        )
        for name in (*DEFAULT, *SLOW)
    ],
)


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def assert_rows_near(rows, expected, **near):
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            if value is not None:
                assert row[key] == pytest.approx(value, **near), key


@EACH_STRATEGY
@pytest.mark.parametrize("run", ["gated", "plain", "finite"])
def test_two_processes_train_and_stop_as_one(two, one, strategy, run):
    ranks, alone = two(strategy, run), one[run]
    numel = sum(w.numel() for w in alone["weights"].values())
    first = ranks[0]
    for rank in ranks:
        assert rank["world_size"] == 2
        assert rank["kind"] == next(k for s, k in KINDS.items() if strategy.startswith(s))
        for key in ("optimizer", "steps", "counts", "sizes", "clipped", "best"):
            assert rank[key] == alone[key], key
        # To the bit: step, reason and every number that led to it.
        for key in ("stop", "history"):
            assert rank[key] == first[key]
        assert largest_difference(rank["weights"], first["weights"]) == 0.0
        assert largest_difference(rank["weights"], alone["weights"]) < 1e-6
    held = [rank["held"] for rank in ranks]
    if strategy == "ddp":
        assert held == [numel, numel]
    else:  # with padding at most: no rank holds the states of the whole model
        assert numel <= sum(held) <= numel + 4
        assert max(held) < 0.7 * numel
    for key in ("stop_step", "onset_step", "windows"):
        assert first["stop"][key] == alone["stop"][key]
    assert_rows_near(first["history"], alone["history"], rel=1e-3, abs=1e-6)
    assert [r["said"].count("poprisk: stopped at step") for r in ranks] == [int(run == "gated"), 0]


def test_the_runs_are_not_empty(one):
    """What the test above compares with: a stop, clipping, sizes, other weights."""
    gated, plain, finite = (one[run] for run in ("gated", "plain", "finite"))
    assert gated["stop"]["stop_step"] == gated["steps"] == 40
    assert gated["counts"] == {40.0}
    assert gated["clipped"] > 0.5
    assert plain["optimizer"] == "AdamW"
    assert plain["clipped"] is None
    assert len(plain["history"]) == 3
    assert finite["optimizer"] == "PopRiskAdamW"
    assert finite["sizes"] == {(BATCH, EXAMPLES)}


@EACH_STRATEGY
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(two, strategy):
    for whole, again in zip(two(strategy, "gated"), two(strategy, "gated again"), strict=True):
        assert again["steps"] == whole["steps"]
        assert again["stop"] == whole["stop"]
        assert largest_difference(again["weights"], whole["weights"]) == 0.0
        if strategy == "ddp":  # elsewhere the last window is not saved: agreement begins anew
            assert again["history"] == whole["history"]


def test_a_run_of_one_process_goes_on_with_two(two, one):
    """Training time goes on, the unfinished window does not."""
    ranks = two("ddp", "grown")
    assert ranks[0]["history"] == ranks[1]["history"]
    known = [row["step"] for row in ranks[0]["history"]]
    assert known[:6] == [4, 8, 12, 16, 20, middle("one") + WINDOW]
    assert [row["lr_sum"] for row in ranks[0]["history"]][:5] == [
        row["lr_sum"] for row in one["gated"]["history"]
    ][:5]
    changes = "resumed with world_size 1 -> 2, batch_size 8 -> 4"
    assert [rank["said"].count(changes) for rank in ranks] == [1, 0]


@pytest.mark.parametrize("kind", FSDP1)
def test_the_stop_under_fsdp1_measures_what_one_process_does(two, folder, kind):
    model = sharding_problem.make_model()

    def clip(limit):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    alone = by_hand(model, slice(None), clip, 1, folder)
    first, second = two("fsdp1", kind)
    assert first == second
    for key in ("onset_step", "stop_step", "windows", "armed"):
        assert first["state"][key] == alone["state"][key]
    assert len(alone["history"]) == 4
    # Flat parameters join tensors into one column, which weights of standard errors go by.
    keys = ("signal_ratio", "noise", "risk_decrease", "lr_sum")
    keys = alone["history"][0].keys() if FSDP1[kind] else keys
    rows, expected = (
        [{key: row[key] for key in keys} for row in run["history"]] for run in (first, alone)
    )
    assert_rows_near(rows, expected, rel=1e-3, abs=1e-9)


@EACH_STRATEGY
def test_two_processes_estimate_the_test_loss_as_one(two, one, strategy):
    for run in ("frozen", "moving"):
        first, second = two(strategy, run)
        assert first["criterion"] == "risk"
        assert first["history"] == second["history"]  # to the bit: the ranks stop together
        assert first["steps"] == second["steps"] == one[run]["steps"]
    mine, theirs = two(strategy, "frozen")[0]["history"], one["frozen"]["history"]
    assert len(mine) == len(theirs) == RISK_EPOCHS
    # An estimate knows when examples were measured: here in batches of half the size.
    for is_estimate, near in ((False, {"rel": 1e-5}), (True, {"abs": 0.05})):
        compared = {k for k in mine[0] if ("estimated" in k) == is_estimate and "change" not in k}
        assert_rows_near(
            *([{k: row[k] for k in compared} for row in rows] for rows in (mine, theirs)), **near
        )


@EACH_STRATEGY
def test_visitors_are_shared_out_and_every_sitter_is_measured(two, strategy):
    joins = first_epochs(RISK_EXAMPLES, share=0.25, seed=5, epochs=RISK_EPOCHS)
    ranks = two(strategy, "frozen")
    for key in ("visitors", "sitters"):
        sizes = [[len(batch) for batch in rank[key]] for rank in ranks]
        assert sizes[0] == sizes[1]
    for epoch in range(RISK_EPOCHS):
        steps = slice(epoch * RISK_STEPS, (epoch + 1) * RISK_STEPS)
        mine, other = (set(chain.from_iterable(rank["visitors"][steps])) for rank in ranks)
        assert not mine & other
        assert mine | other == set((joins <= epoch).nonzero().flatten().tolist())
    measured = chain.from_iterable(chain.from_iterable(r["sitters"]) for r in ranks)
    assert set((joins > 0).nonzero().flatten().tolist()) <= set(measured)


@EACH_STRATEGY
def test_sitters_of_a_resumed_run_are_those_of_the_uninterrupted_one(two, strategy):
    for whole, again in zip(two(strategy, "moving"), two(strategy, "moving again"), strict=True):
        assert again["visitors"] == whole["visitors"][-len(again["visitors"]) :]
        assert len(again["visitors"]) == 2 * (RISK_EPOCHS * RISK_STEPS - RISK_MIDDLE)
        assert_rows_near(again["history"], whole["history"], rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_fsdp_asked_for_on_the_cpu_is_ddp(two, one):
    """A canary: once accelerate shards on the CPU, `gloo_is_an_accelerator` can go."""
    for run in two(ON_CPU, "finite"):
        assert run["kind"] == "MULTI_CPU"
        assert run["held"] == sum(w.numel() for w in run["weights"].values())
        assert largest_difference(run["weights"], one["finite"]["weights"]) < 1e-6
