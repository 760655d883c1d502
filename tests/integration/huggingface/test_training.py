"""The names in real runs: train, save, resume."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

import poprisk_integrations.huggingface as hf
from poprisk_integrations import PopRiskAdamW
from tests.helpers.tiny_trainer import arguments, train, weights


def _states_are_equal(one, other):
    return [
        {
            k: torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k]
            for k, v in a.items()
        }
        for a, b in zip(
            one.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True
        )
    ]


@pytest.mark.parametrize(
    ("name", "optim_args"),
    [
        ("poprisk_adamw", "no_gate=embed,foreach=true"),
        ("poprisk_adamw_8bit", None),
        ("poprisk_adamw_paper", None),
    ],
)
def test_three_steps_save_and_resume(name, optim_args, tmp_path):
    options = {"optim": name, "optim_args": optim_args, "max_steps": 5}
    whole = train(arguments(tmp_path, save_strategy="steps", save_steps=3, **options))
    resumed = train(arguments(tmp_path, **options), resume=str(tmp_path / "checkpoint-3"))
    assert isinstance(whole.optimizer.optimizer, PopRiskAdamW)
    assert resumed.state.global_step == 5
    before, after = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    equal = _states_are_equal(whole.optimizer, resumed.optimizer)
    assert len(equal) == 6
    assert all(all(state.values()) for state in equal)
    keys = {"step", "exp_avg", "exp_avg_sq", "exp_dev_sq", "dev_step"}
    assert all(set(state) == keys for state in equal)


def test_llama_with_ungated_embeddings_and_norms(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 17, (16, 8))
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = arguments(
        tmp_path,
        max_steps=3,
        optim_args="gate=soft,alpha=calibrated,false_open_rate=0.05,no_gate=embed|norm",
    )
    trainer = Trainer(model=model, args=args, train_dataset=data)
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    names = {id(p): n for n, p in model.named_parameters()}
    ungated = {
        names[id(p)]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        if group["gate"] == "none"
    }
    assert ungated == {n for n in names.values() if "embed" in n or "norm" in n}


def test_an_adamw_run_continues_with_ours(tmp_path):
    train(
        arguments(tmp_path, optim="adamw_torch", max_steps=3, save_strategy="steps", save_steps=3)
    )
    trainer = train(arguments(tmp_path, max_steps=5), resume=True)
    assert trainer.state.global_step == 5
    state = next(iter(trainer.optimizer.state.values()))
    assert (float(state["step"]), float(state["dev_step"])) == (5.0, 2.0)


def test_gate_statistics_are_logged(tmp_path):
    trainer = train(
        arguments(tmp_path, logging_steps=4), hf.PopRiskMonitorCallback(every_n_steps=2)
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert 0.0 < line["poprisk/open_fraction"] < 1.0
        assert line["poprisk/skipped_nonfinite"] == 0.0
        assert {"poprisk/mean_gate", "poprisk/update_norm_ratio", "poprisk/effective_lr"} <= {*line}
        assert not any(key.startswith("poprisk/group") for key in line)


def test_monitor_without_a_gate_says_so(tmp_path, caplog):
    trainer = train(arguments(tmp_path, optim="sgd", max_steps=2), hf.PopRiskMonitorCallback())
    assert "the optimizer has no gate" in caplog.text
    assert not any(k.startswith("poprisk/") for line in trainer.state.log_history for k in line)
