import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.huggingface import PopRiskTrainerMixin, optimizer_cls_and_kwargs
from poprisk_integrations.huggingface.optimizer import GateSplitPopRiskAdamW
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
    assert _table(optimizer, names) == {
        "embed.weight": ("none", 0.1),
        "embed.bias": ("none", 0.0),
        "norm.weight": ("none", 0.0),
        "norm.bias": ("none", 0.0),
        "head.weight": ("hard", 0.1),
        "head.bias": ("hard", 0.0),
    }


def test_no_gate_finds_berts_layer_norms(tmp_path):
    """`LayerNorm`: upper and lower case are the same."""
    config = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    model = BertForSequenceClassification(config)
    args = arguments(tmp_path, optim_args="no_gate=embed|norm")
    optimizer = Trainer(model=model, args=args, train_dataset=dataset()).create_optimizer()
    ungated = {id(p) for g in optimizer.param_groups if g["gate"] == "none" for p in g["params"]}
    names = {name for name, param in model.named_parameters() if id(param) in ungated}
    assert names == {n for n, _ in model.named_parameters() if "embed" in n or "LayerNorm" in n}


def test_no_gate_for_a_whole_group_leaves_no_empty_one(tmp_path):
    optimizer, names = _create(arguments(tmp_path, optim_args="no_gate=weight"))
    assert all(group["params"] for group in optimizer.param_groups)
    table = _table(optimizer, names)
    assert {n for n, (gate, _) in table.items() if gate == "none"} == {
        "embed.weight",
        "norm.weight",
        "head.weight",
    }


def test_no_gate_that_matches_nothing_raises(tmp_path):
    with pytest.raises(ValueError, match="'router' matches no parameter"):
        _create(arguments(tmp_path, optim_args="no_gate=embed|router"))


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
    with pytest.raises(ValueError, match=r"(?i)batch_size|dataset_size"):
        _create(arguments(tmp_path, optim_args="alpha=finite,dataset_size=8"))


def test_wrong_value_names_the_argument(tmp_path):
    with pytest.raises(ValueError, match="Invalid gate: 'sofd'"):
        _create(arguments(tmp_path, optim_args="gate=sofd"))


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
