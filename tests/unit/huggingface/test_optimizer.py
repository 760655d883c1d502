import re

import pytest
import torch
from transformers import Trainer

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.huggingface import PopRiskTrainerMixin, optimizer_cls_and_kwargs
from poprisk_integrations.huggingface.optimizer import (
    GateSplitPopRiskAdamW,
    check_deepspeed_config,
)
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset


def _create(args, cls=Trainer, **options):
    model = TinyModel()
    trainer = cls(model=model, args=args, train_dataset=dataset(), **options)
    return trainer.create_optimizer(), {id(p): n for n, p in model.named_parameters()}


def _table(optimizer, names):
    """{parameter name: (gate, weight decay)}"""
    return {
        names[id(p)]: (group["gate"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_numbers_come_from_the_arguments(tmp_path):
    args = arguments(tmp_path, learning_rate=2e-3, adam_beta1=0.8, adam_epsilon=1e-6)
    cls, kwargs = optimizer_cls_and_kwargs(args, gate="hard", alpha=0.3)
    assert cls is PopRiskAdamW
    assert kwargs == {
        "lr": 2e-3,
        "betas": (0.8, 0.999),
        "eps": 1e-6,
        "gate": "hard",
        "alpha": 0.3,
    }
    with pytest.raises(ValueError, match="unknown key 'gat'"):
        optimizer_cls_and_kwargs(args, gat="hard")


def test_public_seam_of_trainer_needs_no_name(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch", weight_decay=0.1)
    pair = optimizer_cls_and_kwargs(args, gate="snr")
    optimizer, _ = _create(args, optimizer_cls_and_kwargs=pair)
    assert type(optimizer) is PopRiskAdamW
    assert [(g["gate"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("snr", 0.1),
        ("snr", 0.0),
    ]


def test_8bit_name_sets_the_format(tmp_path):
    optimizer, _ = _create(arguments(tmp_path, optim="poprisk_adamw_8bit", optim_args="rho=0.9"))
    assert optimizer.param_groups[0]["state_dtype"] == "8bit"
    assert optimizer.param_groups[0]["rho"] == 0.9
    chosen = arguments(tmp_path, optim="poprisk_adamw", optim_args="state_dtype=bfloat16")
    assert _create(chosen)[0].param_groups[0]["state_dtype"] == "bfloat16"


def test_paper_name_is_the_classmethod(tmp_path):
    optimizer, _ = _create(arguments(tmp_path, optim="poprisk_adamw_paper"))
    paper = PopRiskAdamW.paper([torch.nn.Parameter(torch.zeros(1))])
    own = set(paper.defaults) - {"lr", "betas", "eps", "weight_decay"}
    assert {k: optimizer.param_groups[0][k] for k in own} == {k: paper.defaults[k] for k in own}
    assert optimizer.param_groups[0]["alpha"] == 1.0
    optimizer, _ = _create(arguments(tmp_path, optim="poprisk_adamw_paper", optim_args="alpha=2"))
    assert optimizer.param_groups[0]["alpha"] == 2.0
    assert optimizer.param_groups[0]["noise_mean"] == "raw"


def test_no_gate_keeps_trainers_decay_groups(tmp_path):
    args = arguments(tmp_path, optim_args="gate=hard,no_gate=embed|norm", weight_decay=0.1)
    optimizer, names = _create(args)
    assert isinstance(optimizer, PopRiskAdamW)
    gates = {"embed": "none", "norm": "none", "head": "hard"}
    decays = {"weight": 0.1, "bias": 0.0}
    expected = {f"{a}.{b}": (gates[a], decays[b]) for a in gates for b in decays}
    assert _table(optimizer, names) == {**expected, "norm.weight": ("none", 0.0)}


def test_no_gate_for_a_whole_group_leaves_no_empty_one(tmp_path):
    optimizer, names = _create(arguments(tmp_path, optim_args="no_gate=weight"))
    assert all(group["params"] for group in optimizer.param_groups)
    for name, (gate, _) in _table(optimizer, names).items():
        assert (gate == "none") is ("weight" in name)


def test_empty_groups_survive(tmp_path):
    """With LoRA, Trainer's no-decay group is empty."""
    p, q = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = GateSplitPopRiskAdamW([{"params": [p, q]}, {"params": []}], ungated=[q])
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1, 0]


def test_no_gate_outside_a_trainer_needs_the_model(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch")
    with pytest.raises(ValueError, match="no_gate needs the model's parameter names"):
        optimizer_cls_and_kwargs(args, no_gate="embed")
    model = TinyModel()
    pair = optimizer_cls_and_kwargs(args, model, no_gate="embed")
    trainer = Trainer(model=model, args=args, optimizer_cls_and_kwargs=pair)
    table = _table(trainer.create_optimizer(), {id(p): n for n, p in model.named_parameters()})
    assert table["embed.weight"][0] == "none"
    assert table["head.weight"][0] == "soft"


def test_finite_alpha_needs_sizes_that_fit(tmp_path):
    args = arguments(tmp_path, optim_args="alpha=finite")
    with pytest.raises(ValueError, match="dataset_size=N"):
        optimizer_cls_and_kwargs(args)
    _, kwargs = optimizer_cls_and_kwargs(args, dataset_size=64)
    assert kwargs["batch_size"] == 8
    args.optim_args = "alpha=finite,dataset_size=640"  # as a stream needs it
    _, kwargs = optimizer_cls_and_kwargs(args)
    assert (kwargs["batch_size"], kwargs["dataset_size"]) == (8, 640)


@pytest.mark.parametrize(
    ("options", "said"),
    [("gate=sofd", "Invalid gate: 'sofd'"), ("no_gate=embed|x", "'x' matches no parameter")],
)
def test_wrong_values_are_named(tmp_path, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        _create(arguments(tmp_path, optim_args=options))


class _MixedIn(PopRiskTrainerMixin, Trainer):
    pass


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "poprisk_adamw"])
def test_mixin_replaces_adamw(tmp_path, optim):
    args = arguments(tmp_path, optim=optim, optim_args="alpha=finite,no_gate=embed")
    optimizer, names = _create(args, _MixedIn)
    assert isinstance(optimizer, PopRiskAdamW)
    assert _table(optimizer, names)["embed.weight"][0] == "none"
    assert {g["dataset_size"] for g in optimizer.param_groups} == {64}


def test_mixin_refuses_other_optimizers_by_name(tmp_path):
    with pytest.raises(ValueError, match="Invalid optim: 'sgd'"):
        _create(arguments(tmp_path, optim="sgd"), _MixedIn)


def test_mixin_keeps_an_optimizer_that_was_passed(tmp_path):
    sgd = torch.optim.SGD(TinyModel().parameters(), lr=0.1)
    optimizer, _ = _create(arguments(tmp_path, optim="sgd"), _MixedIn, optimizers=(sgd, None))
    assert optimizer is sgd


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ALLOWED = {"zero_force_ds_cpu_optimizer": False}
SUPER = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}}
ZENFLOW = {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}
SECTION = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({}, ""),
        ({"zero_optimization": {"stage": 3}}, ""),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, ""),
        ({"zero_optimization": {"offload_optimizer": {"device": "auto"}}}, ""),
        ({"zero_optimization": {"offload_optimizer": None, "zenflow": None}}, ""),
        ({**OFFLOAD, **ALLOWED}, ""),
        (SECTION, '"zero_allow_untested_optimizer": true'),
        (OFFLOAD, '"zero_force_ds_cpu_optimizer": false'),
        ({**OFFLOAD, "zero_force_ds_cpu_optimizer": True}, '"zero_force_ds_cpu_optimizer": false'),
        ({**SUPER, **ALLOWED}, '"super_offload": false'),
        (ZENFLOW, '"zenflow": null'),
        ({"zero_optimization": {**OFFLOAD["zero_optimization"], "zenflow": {}}}, '"zenflow": null'),
    ],
)
def test_a_silent_replacement_raises_with_the_json_line(config, line):
    if not line:
        check_deepspeed_config(config)
        return
    with pytest.raises(ValueError, match="would replace PopRiskAdamW") as caught:
        check_deepspeed_config(config)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
