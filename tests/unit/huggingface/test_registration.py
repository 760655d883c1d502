"""The names in transformers, and a canary for each upstream name that registration.py touches."""

import copy
import dataclasses
import enum
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
from poprisk_integrations.huggingface import registration
from poprisk_integrations.huggingface.optimizer import NAMES
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset


def test_canary_enum_tables():
    """What `_add_enum_member` writes is what the enum machinery reads."""
    assert issubclass(OptimizerNames, (str, enum.Enum))
    assert isinstance(OptimizerNames._member_names_, list)
    assert isinstance(OptimizerNames._member_map_, dict)
    assert isinstance(OptimizerNames._value2member_map_, dict)
    stock, ours = OptimizerNames.ADAMW_TORCH, OptimizerNames.POPRISK_ADAMW
    assert vars(stock).keys() <= vars(ours).keys()
    assert ours in list(OptimizerNames)
    assert OptimizerNames["POPRISK_ADAMW"] is OptimizerNames("poprisk_adamw") is ours
    assert (ours.name, ours.value, str(ours.value)) == ("POPRISK_ADAMW", *["poprisk_adamw"] * 2)
    assert hash(ours) == hash("poprisk_adamw")
    assert ours == "poprisk_adamw"


def test_canary_factory_is_a_static_method_of_args_and_model():
    original = inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs")._original
    assert list(inspect.signature(original).parameters) == ["args", "model"]
    assert "self.get_optimizer_cls_and_kwargs(" in inspect.getsource(Trainer.create_optimizer)


def test_canary_state_and_deepspeed_methods():
    load = inspect.unwrap(TrainerState.load_from_json.__func__)
    assert list(inspect.signature(load).parameters) == ["cls", "json_path"]
    process = inspect.unwrap(HfTrainerDeepSpeedConfig.trainer_config_process)
    assert list(inspect.signature(process).parameters)[:2] == ["self", "args"]


def test_canary_trackers_are_called_by_the_handlers_on_log():
    on_log = inspect.unwrap(CallbackHandler.on_log)
    assert list(inspect.signature(on_log).parameters)[:5] == [
        "self", "args", "state", "control", "logs",
    ]  # fmt: skip
    assert "self.callback_handler.on_log(" in inspect.getsource(Trainer.log)
    assert "self.callbacks" in inspect.getsource(CallbackHandler.call_event)


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
    members = list(OptimizerNames)
    factory = inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs")
    process, load, on_log = (
        HfTrainerDeepSpeedConfig.trainer_config_process,
        TrainerState.load_from_json.__func__,
        CallbackHandler.on_log,
    )
    hf.register()
    assert list(OptimizerNames) == members
    assert [m.value for m in members].count("poprisk_adamw") == 1
    assert inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs") is factory
    assert HfTrainerDeepSpeedConfig.trainer_config_process is process
    assert TrainerState.load_from_json.__func__ is load
    assert CallbackHandler.on_log is on_log


def test_the_names():
    assert NAMES == ("poprisk_adamw", "poprisk_adamw_8bit", "poprisk_adamw_paper")


def test_a_name_of_someone_else_is_refused(monkeypatch):
    foreign = str.__new__(OptimizerNames, "poprisk_adamw")
    monkeypatch.setitem(OptimizerNames._value2member_map_, "poprisk_adamw", foreign)
    with pytest.raises(RuntimeError, match="'poprisk_adamw': another package has added it"):
        registration.register()


@pytest.mark.parametrize("name", NAMES)
def test_round_trips_of_the_arguments(name, tmp_path):
    args = arguments(tmp_path, optim=name, optim_args="rho=0.9")
    member = OptimizerNames(name)
    assert args.optim is member
    assert pickle.loads(pickle.dumps(args)).optim is member
    assert copy.deepcopy(args).optim is member
    assert dataclasses.replace(args, learning_rate=1.0).optim is member
    assert json.loads(args.to_json_string())["optim"] == name
    assert TrainingArguments(**args.to_dict()).optim is member
    assert TrainingArguments(**{"output_dir": "x", "use_cpu": True, "optim": name}).optim is member
    assert args.to_sanitized_dict()["optim"] == name
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).optim is member


@pytest.mark.parametrize("name", NAMES)
def test_command_line_and_dictionary(name, tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    line = ["--output_dir", str(tmp_path), "--optim", name, "--optim_args", "gate=hard"]
    (args,) = parser.parse_args_into_dataclasses([*line, "--use_cpu"])
    assert args.optim is OptimizerNames(name)
    (args,) = parser.parse_dict({"output_dir": str(tmp_path), "optim": name, "use_cpu": True})
    assert args.optim is OptimizerNames(name)


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


@pytest.mark.parametrize("text", ["gates=soft", "gate", "gate=soft,gate=hard"])
def test_optim_args_errors_are_ours(tmp_path, text):
    """transformers' own parser would say "not enough values to unpack"."""
    with pytest.raises(ValueError, match=r"Invalid optim_args: .* Valid keys: alpha"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args=text))


def test_finite_alpha_takes_both_sizes_from_the_trainer(tmp_path):
    args = arguments(tmp_path, optim_args="alpha=finite", gradient_accumulation_steps=2)
    trainer = Trainer(model=TinyModel(), args=args, train_dataset=dataset(64))
    groups = trainer.create_optimizer().param_groups
    assert {(g["batch_size"], g["dataset_size"]) for g in groups} == {(16, 64)}


def test_finite_alpha_without_a_length_asks_for_it(tmp_path):
    args = arguments(tmp_path, optim_args="alpha=finite", max_steps=2)
    with pytest.raises(ValueError, match='optim_args="alpha=finite,dataset_size=N"'):
        Trainer.get_optimizer_cls_and_kwargs(args)
    args.optim_args = "alpha=finite,dataset_size=640"
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert (kwargs["batch_size"], kwargs["dataset_size"]) == (8, 640)


def test_state_knows_its_checkpoint(tmp_path):
    path = tmp_path / "elsewhere" / "trainer_state.json"
    path.parent.mkdir()
    TrainerState(global_step=3).save_to_json(str(path))
    state = TrainerState.load_from_json(str(path))
    assert registration.checkpoint_directory(state) == str(path.parent)
    assert registration.checkpoint_directory(TrainerState()) is None
    state.save_to_json(str(path))
    assert "elsewhere" not in path.read_text()


def test_missing_transformers_gives_the_pip_line():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try: import poprisk_integrations.huggingface\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == (
        "transformers not found. Run: pip install 'poprisk_integrations[hf]'"
    )


def test_names_exist_only_after_the_import():
    code = (
        "from transformers.training_args import OptimizerNames as names\n"
        "before = 'poprisk_adamw' in list(names)\n"
        "import poprisk_integrations; between = 'poprisk_adamw' in list(names)\n"
        "import poprisk_integrations.huggingface; print(before, between, names('poprisk_adamw'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = out.stdout.splitlines()[-1]  # imports may print too
    assert last.split()[:2] == ["False", "False"]


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; its config is checked without it in test_deepspeed_config",
)


@needs_deepspeed
@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"optimizer": {"type": "AdamW"}}, "zero_allow_untested_optimizer"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            '"zero_force_ds_cpu_optimizer": false',
        ),
    ],
)
def test_deepspeed_config_is_refused_with_the_arguments(config, line, tmp_path):
    """With an "optimizer" section Trainer never asks for an optimizer, so this is the place."""
    deepspeed = HfTrainerDeepSpeedConfig({"train_micro_batch_size_per_gpu": "auto", **config})
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="would replace PopRiskAdamW") as caught:
        deepspeed.trainer_config_process(args)
    assert line in str(caught.value)
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
@pytest.mark.parametrize(("device", "refused"), [("none", False), ("cpu", True)])
def test_offload_left_to_the_launcher_is_checked_when_it_is_known(
    device, refused, tmp_path, monkeypatch
):
    """`accelerate launch --offload_optimizer_device` fills in "auto" after the first check."""
    from accelerate.utils import DeepSpeedPlugin

    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", device)
    offload = {"stage": 2, "offload_optimizer": {"device": "auto"}}
    config = HfTrainerDeepSpeedConfig(
        {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": offload}
    )
    args = arguments(tmp_path)
    config.trainer_config_process(args)
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=config)
    assert config.config["zero_optimization"]["offload_optimizer"]["device"] == device
    if refused:
        with pytest.raises(ValueError, match='"zero_force_ds_cpu_optimizer": false'):
            hf.optimizer_cls_and_kwargs(args)
    else:
        hf.optimizer_cls_and_kwargs(args)
