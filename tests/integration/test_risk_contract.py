"""Examples sit out, the test loss is estimated, the run ends at its minimum: alike in frameworks.

Two processes are in `tests/distributed/test_contract.py`.
"""

import inspect
import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from poprisk_integrations.core.sit_out_schedule import first_epochs
from poprisk_integrations.diagnostics.risk_run import RiskRun
from poprisk_integrations.diagnostics.sitting_out import SittingOut
from poprisk_integrations.diagnostics.stop_options import StopOptions
from tests.helpers.tiny_classifier import Classifier, dataset
from tests.integration.frameworks import CLASSES, FRAMEWORKS, Stream, decide, equal, make
from tests.integration.frameworks import run as train
from tests.integration.lightning import toy

pytestmark = [
    *toy.third_party_warnings,
    pytest.mark.filterwarnings("ignore:.*IterableDataset. has .__len__. defined"),
]
EPOCH = 8  # steps
NOISY = dataset(256, wrong=0.5)
SETTINGS = {
    "plain": {},
    "accumulate": {"accumulate": 4},
    "clip": {"clip": 0.1},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}
LR = 2e-2
SEED = {"lightning": 0, "huggingface": 5}  # of those who sit out


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


def risk(framework, **options):
    return make(framework, **{"criterion": "risk", "action": "stop", "patience": 3, **options})


def adamw(params):
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.0)


def schedule(kind, steps):
    """Factor of the learning rate at a step."""
    factor = {
        "constant": lambda t: 1.0,
        "linear": lambda t: max(0.0, 1 - t / steps),
        "warm-up": lambda t: min(1.0, (t + 1) / (0.6 * steps)),
    }[kind]
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit(framework, root, stop=None, *, kind="constant", **job):
    """Six epochs over noisy labels."""
    job = {"data": NOISY, "net": Classifier(width=64), "epochs": 6, "shuffled": True, **job}
    steps = job["epochs"] * EPOCH
    job |= {"make_optimizer": adamw, "make_schedule": schedule(kind, steps)}
    return train(framework, root, *([stop] if stop else []), **job)


BAD = [
    ({"kappa": 0.5}, "Invalid kappa: 0.5. Must be finite and >= 1"),
    ({"kappa": float("nan")}, "Invalid kappa: nan"),
    ({"threshold": 0.0}, "Invalid threshold: 0.0"),
    ({"min_steps": -1}, "Invalid min_steps: -1"),
    ({"window": 3}, "Invalid window: 3. Must be 'auto' or an integer >= 4"),
    ({"window": "epoch"}, "Invalid window: 'epoch'"),
    ({"window": 8.0}, "Invalid window: 8.0"),
    ({"window": True}, "Invalid window: True"),
    ({"action": "halt"}, "Invalid action: 'halt'. Must be one of ('stop', 'cooldown', 'monitor'"),
    ({"restore": "last"}, "Invalid restore: 'last'. Must be one of ('best', 'stop', 'onset', N"),
    ({"criterion": "risk", "restore": "onset"}, "With criterion='risk' there is no onset"),
    ({"accumulator": "fast"}, "Invalid accumulator: 'fast'. Must be one of ('auto', 'exact', "),
    ({"epoch_steps": 0}, "Invalid epoch_steps: 0. Must be None or an integer >= 1"),
    ({"epoch_steps": 8.0}, "Invalid epoch_steps: 8.0"),
    ({"criterion": "loss"}, "Invalid criterion: 'loss'. Must be one of ('auto', 'risk', 'signal')"),
    ({"sit_out": 0.0}, "Invalid sit_out: 0.0. Must be a number in (0, 0.5]"),
    ({"sit_out": True}, "Invalid sit_out: True"),
    ({"sit_out": "a tenth"}, "Invalid sit_out: 'a tenth'"),
    ({"patience": 0}, "Invalid patience: 0. Must be an integer >= 1"),
    ({"patience": 2.5}, "Invalid patience: 2.5"),
    ({"example_losses": 3}, "Invalid example_losses: 3. Must be None or a function"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_bad_arguments_are_named(framework, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(framework, **options)


def test_arguments_are_those_of_the_options_with_their_defaults(framework):
    found = inspect.signature(CLASSES[framework, "stop"]).parameters
    assert {name: p.default for name, p in found.items()} == StopOptions().arguments()
    given = {
        "criterion": "signal", "sit_out": 0.2, "patience": 4, "kappa": 3.0, "window": 20,
        "threshold": 2.0, "min_steps": 7, "action": "monitor", "restore": None,
        "accumulator": "exact", "epoch_steps": 9, "example_losses": by_hand,
    }  # fmt: skip
    options = make(framework, **given).options
    assert options.arguments() == given
    rule = options.signal_config()
    assert (rule.kappa, rule.threshold, rule.min_steps) == (3.0, 2.0, 7)
    assert (rule.arm_threshold, rule.rearm_threshold) == (2.1, 2.6)  # scaled with the threshold
    assert (options.risk_config().patience, options.risk_config().min_steps) == (4, 7)


# Who sits out, and what is measured.


@pytest.mark.parametrize("name", SETTINGS)
def test_everyone_is_forwarded_once_an_epoch_and_sitters_without_gradient(
    tmp_path, framework, name
):
    stop = risk(framework, action="monitor", sit_out=0.2)
    run = fit(framework, tmp_path, stop, epochs=3, **SETTINGS[name])
    seen = run.net.seen[1:]  # the first was the look at the start
    joins = first_epochs(256, share=0.2, seed=SEED[framework], epochs=3)
    batches = sum(entry.trains for entry in seen) // 3
    numbers = list(itertools.accumulate(entry.trains for entry in seen))
    for epoch in range(3):
        # Sitters of an epoch come before its last batch.
        sits = set((joins > epoch).nonzero().flatten().tolist())
        mine = [e for e, k in zip(seen, numbers, strict=True) if (k - e.trains) // batches == epoch]
        visitors = [i for entry in mine if entry.trains for i in entry.indices]
        assert sorted(visitors) == sorted(set(range(256)) - sits)
        assert sorted(i for entry in mine if not entry.trains for i in entry.indices) == sorted(
            sits
        )
        assert bool(sits) is (epoch < 2)
    rows = stop.history
    assert rows[-1]["step"] == run.steps == 3 * EPOCH
    # The first window by hand: what each example lost before its first update.
    of_window = [entry for entry in seen if entry.trains][: round(rows[0]["epoch"] * batches)]
    losses = torch.cat([entry.losses for entry in of_window])
    close = {"rel": {"bf16": 2e-2, "fp16": 2e-3}.get(name, 1e-4)}
    assert rows[0]["train_loss"] == pytest.approx(float(losses.mean()), **close)
    for row in rows:
        assert row["estimated_test_loss"] > 0
        assert 0 <= row["estimated_test_accuracy"] <= 1
        assert {"step", "train_loss", "estimated_gap", "signal_ratio"} <= row.keys()


def _nobody(self):
    return torch.zeros(self.examples, dtype=torch.bool)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_nobody_sitting_out_a_run_is_the_plain_one_to_the_bit(
    tmp_path, framework, accumulate, monkeypatch
):
    """With dropout and running statistics."""
    monkeypatch.setattr(SittingOut, "sits", _nobody)
    stop = risk(framework, action="monitor")
    runs = [
        fit(
            framework, tmp_path / str(k), stop, net=Classifier(norm=True, dropout=0.3), epochs=3,
            accumulate=accumulate,
        )
        for k, stop in enumerate((None, stop))
    ]  # fmt: skip
    assert equal(runs[0].weights, runs[1].weights)
    assert stop.history


def test_measuring_sitters_changes_nothing(tmp_path, framework, monkeypatch):
    """Weights, running statistics, random numbers: to the bit."""
    found = []
    for k in range(2):
        net = Classifier(norm=True, dropout=0.3)
        run = fit(framework, tmp_path / str(k), risk(framework, action="monitor"), net=net)
        found.append((run.weights, torch.get_rng_state()))
        assert any(not entry.trains for entry in net.seen[1:]) is (k == 0)
        monkeypatch.setattr(RiskRun, "measure_sitters", lambda self, number, forward: None)
    assert equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


class Lossless(Classifier):
    """Its loss is nobody's function."""

    def forward(self, x, labels=None, index=None):
        logits = self.last(self.first(x).relu())
        logs = logits - logits.logsumexp(-1, keepdim=True)
        return {"loss": -logs.gather(1, labels[:, None]).mean(), "logits": logits}


def by_hand(model, batch):
    outputs = getattr(model, "net", model)(batch["x"], batch["labels"])
    return F.cross_entropy(outputs["logits"], batch["labels"], reduction="none")


def test_losses_by_the_users_function(tmp_path, framework):
    found = []
    for net, function in ((Lossless(), by_hand), (Classifier(), by_hand), (Classifier(), None)):
        stop = risk(framework, action="monitor", example_losses=function)
        fit(framework, tmp_path / str(len(found)), stop, net=net, epochs=3)
        found.append([row["estimated_test_loss"] for row in stop.history])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[1] == pytest.approx(found[2], rel=1e-4)


# What becomes of a decision.


def test_an_overfitting_run_ends_with_its_best_weights(tmp_path, framework):
    """Half of the labels are wrong, and the net can learn them all."""
    stop = risk(framework, criterion="auto", sit_out=0.25)
    job = {"net": Classifier(width=128), "data": dataset(512, wrong=0.5), "epochs": 40}
    run = fit(framework, tmp_path, stop, **job)
    report, text = run.report, "\n".join(run.said)
    assert 0 < report["best_step"] < report["stop_step"] == run.steps < 40 * 16
    assert (report["criterion"], report["stopped"], report["why"]) == ("risk", True, None)
    assert report["history"] == stop.history
    assert report["setup"] == {"examples": 512, "share": 0.25, "epochs": 40.0}
    assert equal(run.weights, run.at[report["best_step"]])
    assert "estimates the test loss without validation data: a random " in text
    assert f"at step {run.steps}: the estimated test loss was lowest at step" in text
    assert "; stops here" in text
    assert "estimated test loss" in text


ENDS = {  # options, the rule's say, (last step, step whose weights stay)
    "stop": ({}, {"stop": 24, "best": (8, 16)}, (24, 16)),
    "stop, the last weights": ({"restore": None}, {"stop": 24, "best": (8,)}, (24, 24)),
    "stop, its weights": ({"restore": "stop"}, {"stop": 24, "best": (8,)}, (24, 24)),
    "the end, risen": ({}, {"best": (8, 16), "keeps": True}, (48, 16)),
    "the end": ({}, {"best": (8, 16)}, (48, 48)),
    "the end, risen, default": ({"action": None}, {"best": (16,), "keeps": True}, (48, 16)),
    "the end, default": ({"action": None}, {"best": (16,)}, (48, 48)),
    "monitor": ({"action": "monitor"}, {"stop": 24, "best": (8,), "keeps": True}, (48, 48)),
    "cooldown": ({"action": "cooldown"}, {"stop": 24, "best": (16,)}, (30, 30)),
    "default": ({"action": None}, {"stop": 24, "best": (16,)}, (30, 30)),
}


@pytest.mark.parametrize("name", ENDS)
def test_which_weights_stay_and_when_it_ends(tmp_path, framework, name, monkeypatch):
    options, decision, (last, kept) = ENDS[name]
    decide(monkeypatch, **decision)
    run = fit(framework, tmp_path, risk(framework, **options))
    assert run.steps == last
    assert equal(run.weights, run.at[kept])
    if options.get("action", "stop") != "monitor":
        report = run.report
        assert report["stopped"] is ("stop" in decision)
        assert report["stop_step"] == decision.get("stop")
        assert report["cooldown_step"] == (24 if last == 30 else None)


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_a_cooldown_goes_from_the_best_weights_to_a_rate_of_zero(
    tmp_path, framework, kind, monkeypatch
):
    decide(monkeypatch, stop=24, best=(16,), tail=12)
    stop = risk(framework, action="cooldown")
    run = fit(framework, tmp_path, stop, kind=kind)
    assert run.steps == 36
    for step in range(1, 37):
        share = 1.0 if step <= 24 else 1 - (step - 24) / 13
        of_schedule = 1.0 if kind == "constant" else 1 - (step - 1) / 48
        assert run.rates[step - 1] == pytest.approx(LR * share * of_schedule), step

    def distance(a, b):
        return float((run.at[a]["first.weight"] - run.at[b]["first.weight"]).norm())

    assert distance(25, 16) < distance(25, 24)
    assert not any(not entry.trains for entry in run.net.seen[-12:])
    # Of the last whole epoch all examples are trained on.
    last = [entry.indices for entry in run.net.seen if entry.trains][24:32]
    assert sorted(itertools.chain(*last)) == list(range(256))
    text = "\n".join(run.said)
    assert "decided at step 24; goes back to those weights and anneals over 12 steps" in text
    assert "the cooldown is over: " in text


@pytest.mark.parametrize("kind", ["linear", "warm-up"])
@pytest.mark.parametrize("criterion", ["risk", "signal"])
def test_no_run_ends_in_its_warm_up_nor_while_it_decays(tmp_path, framework, criterion, kind):
    stop = risk(framework, criterion=criterion, patience=2, window=8)
    run = fit(framework, tmp_path, stop, epochs=30, kind=kind)
    assert run.steps >= {"linear": 0.99, "warm-up": 0.6 * 0.99}[kind] * 30 * EPOCH - 1


# Resuming.


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kept", [16, 32])
def test_resumed_is_uninterrupted(tmp_path, framework, kept, accumulate, monkeypatch):
    """In mid-run and in the cooldown: who sits, every estimate, every weight, the decision."""
    decide(monkeypatch, stop=24, best=(16,), tail=12)
    options = {"kind": "linear", "accumulate": accumulate}
    whole, again = risk(framework, action=None), risk(framework, action=None)
    one = fit(framework, tmp_path / "a", whole, save_at=kept, **options)
    two = fit(framework, tmp_path / "b", again, resume=one.checkpoint, **options)
    assert one.steps == two.steps == 36
    assert len(whole.history) == len(again.history) == 3
    for mine, theirs in zip(again.history, whole.history, strict=True):
        known = {name: value for name, value in theirs.items() if value is not None}
        # Last bits of a regression depend on where its numbers lie in memory.
        assert {name: mine[name] for name in known} == pytest.approx(known, rel=1e-12)
    assert equal(one.weights, two.weights)
    trained = [entry.indices for entry in two.net.seen if entry.trains]
    assert trained == [entry.indices for entry in one.net.seen if entry.trains][-len(trained) :]
    assert one.rates[kept:] == two.rates
    assert [one.report["stop_step"], two.report["stop_step"]] == [24, 24]


def test_a_resumed_run_without_the_best_weights_says_so(tmp_path, framework, monkeypatch):
    decide(monkeypatch, best=(8,))
    one = fit(framework, tmp_path / "a", risk(framework, action="monitor"), save_at=16)
    two = fit(framework, tmp_path / "b", risk(framework, action="cooldown"), resume=one.checkpoint)
    assert sum("best window so far, step 8, are not in the checkp" in x for x in two.said) == 1


# Where it cannot be had, and where we fail.


class Sized(Stream):
    def __len__(self):
        return len(self.rows)


NOT_AVAILABLE = {
    "losses": ({"net": Lossless}, "no call of a loss function of torch was seen"),
    "stream": ({"data": Sized(NOISY)}, "the data are a stream"),
    "no length": ({"data": Stream(NOISY), "max_steps": 12 * EPOCH}, "the data are a stream"),
}


@pytest.mark.parametrize("name", NOT_AVAILABLE)
def test_where_it_cannot_be_had_the_run_is_only_watched(tmp_path, framework, name):
    given, why = NOT_AVAILABLE[name]
    made = {**given, "net": given.get("net", Classifier)()}
    auto = make(framework, action="stop", kappa=1.0, window=8, epoch_steps=EPOCH)
    run = fit(framework, tmp_path / "auto", auto, **made, epochs=12)
    assert run.steps == 12 * EPOCH
    (text,) = [line for line in run.said if "the test loss cannot be estimated" in line]
    assert why in text
    assert "criterion='signal' would" in text
    assert run.report["criterion"] == "signal"
    assert why in run.report["why"]
    with pytest.raises(Exception, match="Invalid criterion: 'risk'"):
        fit(framework, tmp_path / "risk", risk(framework), **made)


def test_a_bad_function_of_losses_is_named_before_any_step(tmp_path, framework):
    stop = risk(framework, example_losses=lambda model, batch: torch.zeros(()))
    net = Classifier()
    with pytest.raises(Exception, match=r"Invalid example_losses: it gave \(\)"):
        fit(framework, tmp_path, stop, net=net)
    assert not any(entry.trains for entry in net.seen)


@pytest.mark.parametrize("method", ["close_window", "visited"])
def test_a_failure_of_ours_leaves_the_run_alone(tmp_path, framework, method, monkeypatch):
    """Everybody is back in the batches from the next epoch on, and the run comes to its end."""

    def fail(self, *args, **kwargs):
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(SittingOut, method, fail)
    stop = risk(framework)
    run = fit(framework, tmp_path, stop, epochs=3)
    assert run.steps == 3 * EPOCH
    assert "by design" in stop.switched_off
    assert sum("is switched off" in line for line in run.said) == 1
    if framework == "huggingface":  # Lightning leaves no report then
        assert "by design" in run.report["switched_off"]
    second = [entry.indices for entry in run.net.seen if entry.trains][EPOCH : 2 * EPOCH]
    assert set(itertools.chain(*second)) == set(range(256))
