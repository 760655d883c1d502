"""Losses per example from an ordinary forward pass, against each example computed by itself."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_by_name
from torch.utils.checkpoint import checkpoint

from poprisk_integrations.diagnostics.example_losses import ExampleLosses
from poprisk_integrations.diagnostics.loss_calls import PLACES

B, C, T = 6, 5, 4
Loss = Callable[..., Tensor]


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _classes(*shape: int, seed: int = 1, classes: int = C) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def _probabilities(*shape: int) -> Tensor:
    return _draw(*shape, seed=2).softmax(1)


def _tapped(function: Callable[[], Tensor], rows: int = B, tap: ExampleLosses | None = None) -> Any:
    with (tap or ExampleLosses()).recording(rows) as record:
        record.total = function()
    return record


def _one_by_one(loss: Loss, *batch: Tensor, **options: Any) -> Tensor:
    """Every example alone, as a batch of one: the twin of what is recorded."""
    alone = zip(*(tensor.split(1) for tensor in batch), strict=True)
    return torch.stack([loss(*one, **options) for one in alone]).detach()


LOSSES: dict[str, tuple[Loss, tuple[Tensor, ...], dict[str, Any]]] = {
    "cross_entropy": (F.cross_entropy, (_draw(B, C), _classes(B)), {}),
    "cross_entropy of pixels": (F.cross_entropy, (_draw(B, C, 2, 3), _classes(B, 2, 3)), {}),
    "cross_entropy, smooth": (
        F.cross_entropy, (_draw(B, C), _classes(B)), {"label_smoothing": 0.2},
    ),
    "cross_entropy of shares": (F.cross_entropy, (_draw(B, C), _probabilities(B, C)), {}),
    "nll": (F.nll_loss, (_draw(B, C).log_softmax(1), _classes(B)), {}),
    "mse": (F.mse_loss, (_draw(B, 3), _draw(B, 3, seed=3)), {}),
    "mse of one": (F.mse_loss, (_draw(B), _draw(B, seed=3)), {}),
    "l1": (F.l1_loss, (_draw(B, 3), _draw(B, 3, seed=3)), {}),
    "smooth_l1": (F.smooth_l1_loss, (_draw(B, 3), _draw(B, 3, seed=3)), {"beta": 0.3}),
    "smooth_l1 as l1": (F.smooth_l1_loss, (_draw(B, 3), _draw(B, 3, seed=3)), {"beta": 0.0}),
    "huber": (F.huber_loss, (_draw(B, 3), _draw(B, 3, seed=3)), {"delta": 0.3}),
    "bce": (F.binary_cross_entropy, (_draw(B, 3).sigmoid(), _classes(B, 3, classes=2) * 1.0), {}),
    "bce of scores": (
        F.binary_cross_entropy_with_logits, (_draw(B, 3), _classes(B, 3, classes=2) * 1.0),
        {"pos_weight": torch.tensor([1.0, 2.0, 3.0])},
    ),
    "gaussian": (
        lambda *batch, **options: F.gaussian_nll_loss(*batch, **options),
        (_draw(B, 3), _draw(B, 3, seed=3), _draw(B, 3, seed=4).exp()), {},
    ),
    "poisson": (F.poisson_nll_loss, (_draw(B, 3), _classes(B, 3) * 1.0), {"full": True}),
    "margins": (F.multi_margin_loss, (_draw(B, C), _classes(B)), {"margin": 0.5}),
    "soft margin": (F.soft_margin_loss, (_draw(B, 3), _classes(B, 3, classes=2) * 2.0 - 1), {}),
    "many labels": (
        lambda *batch, **options: F.multilabel_soft_margin_loss(*batch, **options),
        (_draw(B, 3), _classes(B, 3, classes=2) * 1.0), {},
    ),
    "labels in a list": (F.multilabel_margin_loss, (_draw(B, 3), _classes(B, 3, classes=3)), {}),
    "hinge": (F.hinge_embedding_loss, (_draw(B), _classes(B, classes=2) * 2.0 - 1), {}),
    "ranking": (
        F.margin_ranking_loss, (_draw(B), _draw(B, seed=3), _classes(B, classes=2) * 2.0 - 1), {},
    ),
    "cosine": (
        F.cosine_embedding_loss,
        (_draw(B, 3), _draw(B, 3, seed=3), _classes(B, classes=2) * 2.0 - 1), {},
    ),
    "triplets": (
        F.triplet_margin_loss, (_draw(B, 3), _draw(B, 3, seed=3), _draw(B, 3, seed=4)), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_each_row_gets_what_it_loses_alone_and_the_step_stays_the_same_to_the_bit(
    name: str, reduction: str
) -> None:
    loss, batch, options = LOSSES[name]
    scores = [batch[0].detach().clone().requires_grad_() for _ in range(2)]
    before = {place: getattr(place.owner, place.name) for place in PLACES}
    plain = loss(scores[0], *batch[1:], **options, reduction=reduction).sum()
    record = _tapped(lambda: loss(scores[1], *batch[1:], **options, reduction=reduction).sum())
    assert {place: getattr(place.owner, place.name) for place in PLACES} == before
    assert record.reason == ""
    torch.testing.assert_close(record.values["loss"], _one_by_one(loss, *batch, **options))
    assert not record.values["loss"].requires_grad
    plain.backward()
    record.total.backward()
    assert torch.equal(record.total, plain)
    assert torch.equal(scores[0].grad, scores[1].grad)


def test_an_error_in_the_forward_pass_leaves_nothing_behind() -> None:
    before = torch._C._nn.mse_loss
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        _tapped(lambda: F.mse_loss(_draw(B), _draw(B)) / (1 // 0))
    assert torch._C._nn.mse_loss is before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])])
def test_tokens_are_averaged_over_those_that_count(
    weight: Tensor | None, label_smoothing: float
) -> None:
    scores, labels = _draw(B, T, C).requires_grad_(), _classes(B, T)
    labels[0, 1:], labels[1] = -100, -100  # one row with one token, one with none
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing}
    record = _tapped(
        lambda: F.cross_entropy(scores.view(-1, C), labels.view(-1), **options, reduction="sum")
    )
    expected = []
    for row, own in zip(scores, labels, strict=True):
        counted = own != -100
        each = F.cross_entropy(row[counted], own[counted], **options, reduction="none")
        expected.append(each.sum() / counted.sum())
    torch.testing.assert_close(
        record.values["loss"], torch.stack(expected).detach(), equal_nan=True
    )
    assert record.values["loss"][1].isnan()
    hits = torch.stack(
        [(r.argmax(-1) == o)[o != -100].float().mean() for r, o in zip(scores, labels, strict=True)]
    )
    torch.testing.assert_close(record.values["accuracy"], hits, equal_nan=True)


def test_shapes_of_tokens_agree() -> None:
    scores, labels = _draw(B, T, C).requires_grad_(), _classes(B, T)
    flat = _tapped(lambda: F.cross_entropy(scores.view(-1, C), labels.view(-1)))
    deep = _tapped(lambda: F.cross_entropy(scores.transpose(1, 2), labels))
    for name in ("loss", "accuracy"):
        torch.testing.assert_close(flat.values[name], deep.values[name])


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, nn.CrossEntropyLoss(), imported_by_name,
             functools.partial(F.cross_entropy, reduction="sum")],
    ids=["function", "module", "imported", "partial"],
)  # fmt: skip
def test_every_way_to_call_a_loss_is_seen(loss: Loss) -> None:
    scores, labels = _draw(B, C).requires_grad_(), _classes(B)
    record = _tapped(lambda: loss(scores, labels))
    torch.testing.assert_close(
        record.values["loss"], F.cross_entropy(scores, labels, reduction="none").detach()
    )


def test_accuracy_of_classes_and_of_two() -> None:
    scores, labels = _draw(B, C).requires_grad_(), _draw(B, C).argmax(1)
    labels[0] = (labels[0] + 1) % C
    got = _tapped(lambda: F.cross_entropy(scores, labels)).values["accuracy"]
    assert torch.equal(got, (scores.argmax(1) == labels).float())
    assert 0 < got.mean() < 1
    scores, labels = _draw(B, 3).requires_grad_(), _classes(B, 3, classes=2)
    got = _tapped(lambda: F.binary_cross_entropy_with_logits(scores, labels * 1.0)).values
    torch.testing.assert_close(got["accuracy"], ((scores > 0) == labels).float().mean(1))
    assert "accuracy" not in _tapped(lambda: F.mse_loss(scores, labels * 1.0)).values


def test_ctc_is_per_example() -> None:
    scores = _draw(12, B, C).log_softmax(2).requires_grad_()
    labels, lengths = _classes(B, 3) % (C - 1) + 1, torch.tensor([3, 2, 3, 1, 2, 3])
    frames = torch.full((B,), 12)
    record = _tapped(lambda: F.ctc_loss(scores, labels, frames, lengths))
    each = F.ctc_loss(scores, labels, frames, lengths, reduction="none") / lengths
    torch.testing.assert_close(record.values["loss"], each.detach())


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_kl_is_a_sum_over_the_row(reduction: str) -> None:
    logs, shares = _draw(B, C).log_softmax(1).requires_grad_(), _probabilities(B, C)
    record = _tapped(lambda: F.kl_div(logs, shares, reduction=reduction))
    expected = F.kl_div(logs, shares, reduction="none").sum(1).detach()
    torch.testing.assert_close(record.values["loss"], expected)


@pytest.mark.parametrize("grad", [True, False], ids=["visitors", "sitters"])
class TestSeveralLosses:
    def test_the_weights_are_found(self, grad: bool) -> None:
        first, second = _draw(B, C).requires_grad_(), _draw(B, 3).requires_grad_()
        labels, aims = _classes(B), _draw(B, 3, seed=3)
        scale = torch.tensor(0.7, requires_grad=True)

        def step() -> Tensor:
            one = F.cross_entropy(first, labels)
            two = F.mse_loss(second, aims, reduction="sum")
            F.l1_loss(second.detach(), aims)  # a metric
            one *= 2.0
            return one + scale * two / B

        with torch.set_grad_enabled(grad):
            record = _tapped(step)
            assert torch.is_grad_enabled() == grad
        expected = 2 * F.cross_entropy(first, labels, reduction="none")
        expected = expected + 0.7 * (second - aims).square().sum(1)
        torch.testing.assert_close(record.values["loss"], expected.detach())
        torch.testing.assert_close(record.values["loss"].mean(), step().detach())
        assert set(record.values) == {"loss", "accuracy"}

    def test_elements_that_a_mask_leaves_out_do_not_count(self, grad: bool) -> None:
        scores, labels = _draw(B, T, C).requires_grad_(), _classes(B, T)
        mask = torch.ones(B, T)
        mask[0, 1:], mask[2] = 0, 0

        def step() -> Tensor:
            each = F.cross_entropy(scores.view(-1, C), labels.view(-1), reduction="none")
            return (each.view(B, T) * mask).sum() / mask.sum()

        with torch.set_grad_enabled(grad):
            record = _tapped(step)
        each = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none")
        expected = ((each * mask).sum(1) / mask.sum(1)).detach()
        torch.testing.assert_close(record.values["loss"], expected, equal_nan=True)

    def test_pieces_of_a_batch_are_put_together(self, grad: bool) -> None:
        scores, labels = _draw(B, T, C).requires_grad_(), _classes(B, T)
        rows = zip(scores.view(-1, C).chunk(3), labels.view(-1).chunk(3), strict=True)
        with torch.set_grad_enabled(grad):
            record = _tapped(
                lambda: sum((F.cross_entropy(*piece) for piece in rows), torch.zeros(())) / 3
            )
        expected = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none").mean(1)
        torch.testing.assert_close(record.values["loss"], expected.detach())

    def test_parts_that_may_be_other_rows_or_other_losses_are_refused(self, grad: bool) -> None:
        scores, labels = _draw(B, C).requires_grad_(), _classes(2, B)
        with torch.set_grad_enabled(grad):
            record = _tapped(
                lambda: F.cross_entropy(scores, labels[0]) + F.cross_entropy(scores, labels[1])
            )
        assert record.values is None
        assert "parts of one tensor" in record.reason

    def test_a_total_that_depends_on_none_of_them_is_refused(self, grad: bool) -> None:
        scores = _draw(B, 3).requires_grad_()

        def step() -> Tensor:
            F.mse_loss(scores.detach(), _draw(B, 3))
            F.l1_loss(scores.detach(), _draw(B, 3))
            return (scores * 2).square().mean()

        with torch.set_grad_enabled(grad):
            record = _tapped(step)
        assert record.values is None
        assert "example_losses" in record.reason


def test_a_total_may_be_scaled_already() -> None:
    first, second = _draw(B, C).requires_grad_(), _draw(B, 3).requires_grad_()
    tap, values = ExampleLosses(), []
    for scale in (1.0, 256.0):
        tap.start(B)
        total = F.cross_entropy(first, _classes(B)) + F.mse_loss(second, _draw(B, 3))
        values.append(tap.stop(total * scale, scale=torch.tensor(scale)))
    torch.testing.assert_close(values[0], values[1])


PARTS: dict[str, tuple[Loss, float]] = {  # of the loss of scores and classes, and what is not in it
    "all": (lambda s, y: F.cross_entropy(s, y), 0.0),
    "class weights": (lambda s, y: F.cross_entropy(s, y, weight=_probabilities(C, 1)[:, 0]), 0.0),
    "a mean of one's own": (lambda s, y: F.cross_entropy(s, y, reduction="none")[:4].mean(), 0.0),
    "a sum, in parts": (
        lambda s, y: sum(F.cross_entropy(*part, reduction="sum") / 12
                         for part in zip(s.split(3), y.split(3), strict=True)), 0.0,
    ),
    "two": (lambda s, y: F.cross_entropy(s, y) + 0.3 * F.mse_loss(s, torch.zeros_like(s)), 0.0),
    "a penalty": (lambda s, y: F.cross_entropy(s, y) + 0.1 * s.square().mean(), 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PARTS))
@pytest.mark.parametrize("grad", [True, False])
def test_a_loss_of_which_torch_makes_only_a_part_is_noticed(name: str, grad: bool) -> None:
    loss, penalty = PARTS[name]
    scores, tap = _draw(B, C).requires_grad_(), ExampleLosses()
    with torch.set_grad_enabled(grad):
        total = _tapped(lambda: loss(scores, _classes(B)), tap=tap).total
    rest = penalty * float(scores.detach().square().mean())
    whole = float(total.detach())
    expected = (pytest.approx(whole - rest), pytest.approx(whole)) if rest else None
    assert tap.part == expected


def _only_logged() -> Tensor:
    scores = _draw(B, 3).requires_grad_()
    F.mse_loss(scores, _draw(B, 3))
    return scores.square().mean()


REFUSED: dict[str, Loss] = {
    "no call of a loss function": lambda: _draw(B).square().mean(),
    "does not depend": _only_logged,
    "7 rows for 6 examples": lambda: F.cross_entropy(_draw(7, C).requires_grad_(), _classes(7)),
    "all others of its batch": lambda: F.cross_entropy(_draw(B, B), torch.arange(B)),
}


@pytest.mark.parametrize("why", list(REFUSED))
def test_refused_with_a_reason(why: str) -> None:
    record = _tapped(REFUSED[why])
    assert record.values is None
    assert why in record.reason


def test_several_losses_without_their_sum_are_refused_by_name() -> None:
    tap = ExampleLosses()
    tap.start(B)
    F.mse_loss(_draw(B), _draw(B))
    F.cross_entropy(_draw(B, C), _classes(B))
    assert tap.stop() is None
    assert "mse_loss, cross_entropy" in tap.reason


def test_a_recomputed_forward_counts_once() -> None:
    tap, layer = ExampleLosses(), nn.Linear(3, C)
    x, labels = _draw(B, 3), _classes(B)

    def block(x: Tensor) -> Tensor:
        return F.cross_entropy(layer(x), labels)

    tap.start(B)
    loss = checkpoint(block, x, use_reentrant=False)
    values = tap.stop(loss)
    loss.backward()
    assert values is not None
    torch.testing.assert_close(
        values["loss"], F.cross_entropy(layer(x), labels, reduction="none").detach()
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("is_upcast", [False, True])
def test_autocast_changes_nothing(smoothing: float, is_upcast: bool) -> None:
    layer, x, labels = nn.Linear(3, C), _draw(B, 3), _classes(B)

    def step(reduction: str) -> Tensor:
        scores = layer(x)
        scores = scores.float() if is_upcast else scores
        return F.cross_entropy(scores, labels, reduction=reduction, label_smoothing=smoothing)

    with torch.autocast("cpu", torch.bfloat16):
        plain = step("mean")
        record = _tapped(lambda: step("mean"))
        expected = step("none")
    assert torch.equal(record.total, plain)
    assert torch.equal(record.values["loss"], expected.detach().float())


def test_a_compiled_step_is_refused_and_a_compiled_model_is_not() -> None:
    model, x, labels = nn.Linear(3, C), _draw(B, 3), _classes(B)
    compiled = torch.compile(model, backend="aot_eager")
    record = _tapped(lambda: F.cross_entropy(compiled(x), labels))
    torch.testing.assert_close(
        record.values["loss"], F.cross_entropy(model(x), labels, reduction="none").detach()
    )
    step = torch.compile(lambda x: F.cross_entropy(model(x), labels), backend="aot_eager")
    for _ in range(2):  # traced, then run
        record = _tapped(lambda: step(x))
        assert record.values is None
        assert "compiled" in record.reason


def test_large_vocabularies_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from poprisk_integrations.diagnostics import loss_calls

    scores, labels = _draw(B * T, C).requires_grad_(), _classes(B * T)
    whole = _tapped(lambda: F.cross_entropy(scores, labels, label_smoothing=0.1)).values
    monkeypatch.setattr(loss_calls, "_CHUNK", 3 * C)
    pieces = _tapped(lambda: F.cross_entropy(scores, labels, label_smoothing=0.1)).values
    assert torch.equal(whole["loss"], pieces["loss"])
