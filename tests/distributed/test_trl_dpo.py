"""DPO on two gloo processes: TRL's numbers bit for bit, joined margins, one stop for all.

The file is its own script: the test launches it once under torchrun, `main` runs on each rank.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.helpers.tiny_dpo import config_options, easy_pairs, pairs, tiny_model, tiny_tokenizer

LORA = {"r": 4, "target_modules": ["v_proj", "o_proj"]}


def train(
    output_dir: Path, *, ours: bool, peft: bool = False, data: Any = None, **options: Any
) -> Any:
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer

    trainer_class, config_class = (
        (PopRiskDPOTrainer, PopRiskDPOConfig) if ours else (DPOTrainer, DPOConfig)
    )
    trainer = trainer_class(
        tiny_model(),
        ref_model=None if peft else tiny_model(),
        args=config_class(**config_options(output_dir, **options)),
        train_dataset=pairs(32) if data is None else data,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA) if peft else None,
    )
    trainer.train()
    return trainer


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def train_noisy(output_dir: Path, per_device: int) -> Any:
    """130 pairs: the last batch is short, and padded with pairs of the first on two processes."""
    return train(
        output_dir, ours=True, data=easy_pairs(130), noise="rdpo", stop=False, optim="sgd",
        learning_rate=0.3, max_steps=40, per_device_train_batch_size=per_device,
    )  # fmt: skip


def main(folder: Path) -> None:
    """Runs on each rank; writes what it found for the test to judge."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for case, options in {
        "full": {"gradient_accumulation_steps": 2},
        "lora": {"peft": True, "learning_rate": 0.05},
    }.items():
        theirs = train(folder / case, ours=False, optim="adamw_torch", **options)
        monitor = {"stop_action": "monitor", "stop_window": 4, "noise": "off"}
        mine = train(folder / case, ours=True, optim="adamw_torch", **monitor, **options)
        found[case] = {
            "same_weights": torch.equal(weights(mine), weights(theirs)),
            "losses": [logged(trainer, "loss") for trainer in (theirs, mine)],
            **{
                name: logged(mine, f"poprisk/{name}")
                for name in ("kl_data", "margin_p10", "margin_p50", "signal_ratio")
            },
            "margins": logged(mine, "rewards/margins"),
            "rewards": [
                (chosen + rejected) / 2
                for chosen, rejected in zip(
                    logged(mine, "rewards/chosen"), logged(mine, "rewards/rejected"), strict=True
                )
            ],
        }
    stopping = {
        "stop_window": 4,
        "stop_kappa": 1.0,
        "max_steps": 200,
        "learning_rate": 3e-3,
        "optim": "adamw_torch",
    }
    stopped = train(folder / "stop", ours=True, **stopping)
    stop = stopped.callback_handler.callbacks[-1]
    found["stop"] = {"step": stopped.state.global_step, "state": stop.stopping_state}
    sgd = train(folder / "sgd", ours=True, stop=False, optim="sgd", learning_rate=0.1)
    noisy = train_noisy(folder / "noisy", per_device=4)
    found["noisy"] = {
        "loss": noisy._noise.loss.mode,
        "estimate": noisy._noise.estimate.to_json(),
        "margins": noisy._noise.margins.margin.tolist(),
        "steps": noisy._noise.margins.step.tolist(),
        "weights": weights(noisy).tolist(),
    }
    rank = int(os.environ["RANK"])
    torch.save(weights(sgd), folder / f"sgd-{rank}.pt")
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
# transformers 5.23 deprecates a name that TRL 1.16 still uses.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_two_processes(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        __file__, str(tmp_path),
    ]  # fmt: skip
    run = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    for case in ("full", "lora"):
        for rank in (0, 1):
            numbers = found[rank][case]
            assert numbers["same_weights"]
            assert numbers["losses"][0] == numbers["losses"][1]
            # Margins of both ranks: their mean log-ratio is that of TRL's gathered rewards.
            beta = 0.1
            expected = [reward / beta for reward in numbers["rewards"]]
            assert numbers["kl_data"] == pytest.approx(expected, abs=1e-4)
            assert any(abs(value) > 1e-3 for value in expected)
            assert numbers["margin_p10"][-1] < numbers["margin_p50"][-1]
            assert len(numbers["signal_ratio"]) > 0
        for name in ("kl_data", "margin_p10", "margin_p50", "signal_ratio"):
            assert found[0][case][name] == found[1][case][name]
    assert found[0]["stop"] == found[1]["stop"]
    assert found[0]["stop"]["step"] == found[0]["stop"]["state"]["stop_step"] < 200

    one = train_noisy(tmp_path / "noisy-one", per_device=8)
    assert found[0]["noisy"] == found[1]["noisy"]
    assert found[0]["noisy"]["steps"] == one._noise.margins.step.tolist()
    assert found[0]["noisy"]["margins"] == pytest.approx(
        one._noise.margins.margin.tolist(), abs=1e-4
    )
    assert found[0]["noisy"]["estimate"] == pytest.approx(one._noise.estimate.to_json(), abs=2e-3)
    assert (tmp_path / "noisy" / "flip_report.csv").exists()

    joined = train(
        tmp_path / "one", ours=True, stop=False, optim="sgd", learning_rate=0.1,
        per_device_train_batch_size=8,
    )  # fmt: skip
    start = torch.cat([p.flatten() for p in tiny_model().parameters()])
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"sgd-{rank}.pt", weights_only=True)
        assert (theirs - weights(joined)).abs().max() < 1e-6
        assert (theirs - start).abs().max() > 1e-3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
