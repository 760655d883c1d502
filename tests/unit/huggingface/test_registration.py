"""The names in transformers, and a canary for each upstream name that registration.py touches."""

import copy
import dataclasses
import importlib.util
import inspect
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainerState, TrainingArguments
from transformers.integrations import deepspeed as transformers_deepspeed
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.trainer_callback import CallbackHandler
from transformers.training_args import OptimizerNames

import poprisk_integrations.huggingface as hf
from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.huggingface import run_facts
from poprisk_integrations.huggingface.optimizer import NAMES
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset


def test_canary_a_member_like_those_of_transformers():
    stock, ours = OptimizerNames.ADAMW_TORCH, OptimizerNames.POPRISK_ADAMW
    assert vars(stock).keys() <= vars(ours).keys()
    assert ours in list(OptimizerNames)
    assert OptimizerNames["POPRISK_ADAMW"] is OptimizerNames("poprisk_adamw") is ours
    assert (ours.name, ours.value) == ("POPRISK_ADAMW", "poprisk_adamw")
    assert hash(ours) == hash("poprisk_adamw")


FACTORY = inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (FACTORY._original, ["args", "model"]),
        (TrainerState.load_from_json.__func__, ["cls", "json_path"]),
        (HfTrainerDeepSpeedConfig.trainer_config_process, ["self", "args"]),
        (CallbackHandler.on_log, ["self", "args", "state", "control", "logs"]),
    ],
)
def test_canary_what_is_replaced_takes_what_it_took(method, parameters):
    found = list(inspect.signature(inspect.unwrap(method)).parameters)
    assert found[: len(parameters)] == parameters


@pytest.mark.parametrize(
    ("caller", "call"),
    [
        (Trainer.create_optimizer, "self.get_optimizer_cls_and_kwargs("),
        (Trainer.log, "self.callback_handler.on_log("),
        (CallbackHandler.call_event, "self.callbacks"),
    ],
)
def test_canary_it_is_asked_where_it_was(caller, call):
    assert call in inspect.getsource(caller)


@pytest.mark.skipif(
    not hasattr(Trainer, "_clip_grad_norm"),
    reason="transformers < 5.3 clips in the middle of its loop",
)
def test_canary_the_clip_seam_returns_the_norm_before_clipping(tmp_path):
    assert "grad_norm = self._clip_grad_norm(model)" in inspect.getsource(Trainer._run_epoch)
    trainer = Trainer(TinyModel(), arguments(tmp_path, max_grad_norm=0.5), train_dataset=dataset())
    trainer.create_optimizer()
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    numel = sum(p.numel() for p in trainer.model.parameters())
    assert float(trainer._clip_grad_norm(trainer.model)) == pytest.approx(numel**0.5)


def test_register_twice_changes_nothing():
    def known():
        return [
            list(OptimizerNames),
            inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs"),
            HfTrainerDeepSpeedConfig.trainer_config_process,
            TrainerState.load_from_json.__func__,
            CallbackHandler.on_log,
        ]

    before = known()
    hf.register()
    assert known() == before
    assert NAMES == ("poprisk_adamw", "poprisk_adamw_8bit", "poprisk_adamw_paper")
    assert [sum(m.value == name for m in OptimizerNames) for name in NAMES] == [1, 1, 1]


def test_a_name_of_someone_else_is_refused(monkeypatch):
    foreign = str.__new__(OptimizerNames, "poprisk_adamw")
    monkeypatch.setitem(OptimizerNames._value2member_map_, "poprisk_adamw", foreign)
    with pytest.raises(RuntimeError, match="'poprisk_adamw': another package has added it"):
        hf.register()


@pytest.mark.parametrize("name", NAMES)
def test_round_trips_of_the_arguments_and_parsers(name, tmp_path):
    args = arguments(tmp_path, optim=name, optim_args="rho=0.9")
    member = OptimizerNames(name)
    assert args.optim is member
    assert pickle.loads(pickle.dumps(args)).optim is member
    assert copy.deepcopy(args).optim is member
    assert dataclasses.replace(args, learning_rate=1.0).optim is member
    assert json.loads(args.to_json_string())["optim"] == name
    assert TrainingArguments(**args.to_dict()).optim is member
    assert args.to_sanitized_dict()["optim"] == name
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).optim is member
    parser = HfArgumentParser(TrainingArguments)
    line = ["--output_dir", str(tmp_path), "--optim", name, "--use_cpu"]
    assert parser.parse_args_into_dataclasses(line)[0].optim is member
    (args,) = parser.parse_dict({"output_dir": str(tmp_path), "optim": name, "use_cpu": True})
    assert args.optim is member


def test_trl_yaml(tmp_path):
    trl_parser = pytest.importorskip("trl").TrlParser
    config = tmp_path / "config.yaml"
    config.write_text(f"optim: poprisk_adamw_paper\noutput_dir: {tmp_path}\nuse_cpu: true\n")
    parser = trl_parser(TrainingArguments)
    (args,) = parser.parse_args_and_config(["--config", str(config), "--optim_args", "rho=0.9"])
    assert args.optim is OptimizerNames.POPRISK_ADAMW_PAPER
    assert args.optim_args == "rho=0.9"


def test_other_names_are_answered_by_transformers(tmp_path):
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="adamw_torch"))
    assert cls is torch.optim.AdamW
    assert kwargs["lr"] == 3e-2


def test_on_the_class_and_without_a_model(tmp_path):
    """Some trainers ask before there is a model."""
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args="gate=snr"))
    assert (cls.__name__, kwargs["gate"], kwargs["betas"]) == ("PopRiskAdamW", "snr", (0.9, 0.999))
    with pytest.raises(ValueError, match="no_gate needs the model's parameter names"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args="no_gate=embed"))


def test_optim_args_errors_are_ours(tmp_path):
    """transformers' own parser would say "not enough values to unpack"."""
    with pytest.raises(ValueError, match=r"Invalid optim_args: .* Valid keys: alpha"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args="gate"))


def test_finite_alpha_takes_both_sizes_from_the_trainer(tmp_path):
    args = arguments(tmp_path, optim_args="alpha=finite", gradient_accumulation_steps=2)
    trainer = Trainer(model=TinyModel(), args=args, train_dataset=dataset(64))
    groups = trainer.create_optimizer().param_groups
    assert {(g["batch_size"], g["dataset_size"]) for g in groups} == {(16, 64)}


def test_state_knows_its_checkpoint(tmp_path):
    path = tmp_path / "elsewhere" / "trainer_state.json"
    path.parent.mkdir()
    TrainerState(global_step=3).save_to_json(str(path))
    state = TrainerState.load_from_json(str(path))
    assert run_facts.checkpoint_directory(state) == str(path.parent)
    assert run_facts.checkpoint_directory(TrainerState()) is None
    state.save_to_json(str(path))
    assert "elsewhere" not in path.read_text()


def test_names_exist_only_after_the_import_and_without_transformers_there_is_the_pip_line():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try: import poprisk_integrations.huggingface\n"
        "except ImportError as error: print(error)\n"
        "del sys.modules['transformers']\n"
        "from transformers.training_args import OptimizerNames as names\n"
        "before = 'poprisk_adamw' in list(names)\n"
        "import poprisk_integrations; between = 'poprisk_adamw' in list(names)\n"
        "import poprisk_integrations.huggingface; print(before, between, names('poprisk_adamw'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *_, last = out.stdout.splitlines()  # imports may print too
    assert first == "transformers not found. Run: pip install 'poprisk_integrations[hf]'"
    assert last.split()[:2] == ["False", "False"]


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; its config is checked without it in test_optimizer",
)


@needs_deepspeed
def test_deepspeed_config_is_refused_with_the_arguments(tmp_path):
    """With an "optimizer" section Trainer never asks for an optimizer, so this is the place."""
    config = {"train_micro_batch_size_per_gpu": "auto", "optimizer": {"type": "AdamW"}}
    deepspeed = HfTrainerDeepSpeedConfig(config)
    with pytest.raises(
        ValueError, match=r'would replace PopRiskAdamW.*"zero_allow_untested_optimi'
    ):
        deepspeed.trainer_config_process(arguments(tmp_path))
    deepspeed.trainer_config_process(arguments(tmp_path, optim="adamw_torch"))


@pytest.mark.parametrize("optim", ["adamw_torch", "poprisk_adamw"])
def test_an_optimizer_that_deepspeed_would_drop_is_refused(optim, tmp_path):
    model = TinyModel()
    args = arguments(tmp_path, optim=optim)
    optimizers = (PopRiskAdamW(model.parameters()), None)
    trainer = Trainer(model, args, train_dataset=dataset(), optimizers=optimizers)
    other = Trainer(model, args, train_dataset=dataset())
    assert trainer.create_optimizer() is optimizers[0]  # kept without DeepSpeed
    # What transformers.integrations.deepspeed.deepspeed_init does.
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={}))
    trainer.optimizer = None
    with pytest.raises(ValueError, match='"optim": "poprisk_adamw"') as caught:
        trainer.create_optimizer()
    assert repr(optim) in str(caught.value)
    assert other.create_optimizer() is not None


@needs_deepspeed
def test_canary_deepspeed_drops_the_optimizer_and_asks_for_one_by_name():
    source = inspect.getsource(transformers_deepspeed.deepspeed_init)
    assert "trainer.optimizer = None" in source
    source = inspect.getsource(transformers_deepspeed.deepspeed_optim_sched)
    assert "trainer.create_optimizer()" in source


@needs_deepspeed
def test_offload_left_to_the_launcher_is_checked_when_it_is_known(tmp_path, monkeypatch):
    """`accelerate launch --offload_optimizer_device` fills in "auto" after the first check."""
    from accelerate.utils import DeepSpeedPlugin

    for device in ("none", "cpu"):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", device)
        offload = {"stage": 2, "offload_optimizer": {"device": "auto"}}
        config = HfTrainerDeepSpeedConfig(
            {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": offload}
        )
        args = arguments(tmp_path)
        config.trainer_config_process(args)
        args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=config)
        assert config.config["zero_optimization"]["offload_optimizer"]["device"] == device
        if device == "none":
            hf.optimizer_cls_and_kwargs(args)
    with pytest.raises(ValueError, match='"zero_force_ds_cpu_optimizer": false'):
        hf.optimizer_cls_and_kwargs(args)
