"""Estimates the noise rate at the right moment, logs it, saves it, and says how the run ended."""

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations._files import write_whole
from poprisk_integrations.core.noise_rate import FEWEST_PAIRS
from poprisk_integrations.huggingface.callbacks.epoch_length import steps_per_epoch
from poprisk_integrations.huggingface.log_metrics import MetricsCallback
from poprisk_integrations.huggingface.registration import checkpoint_directory
from poprisk_integrations.huggingface.run_facts import (
    batch_size_of,
    checkpoint_path,
    run_directory,
)
from poprisk_integrations.trl.label_noise import LabelNoise
from poprisk_integrations.trl.only_warns import OnlyWarns
from poprisk_integrations.trl.pair_records import PairRecords

__all__ = ["LABELS_FILE", "NOISE_REPORT", "LabelNoiseCallback"]

LABELS_FILE = "poprisk_labels.safetensors"
NOISE_REPORT = "poprisk_noise.json"
_FEWEST_STEPS = 4

logger = logging.getLogger(__name__)


class LabelNoiseCallback(MetricsCallback):
    """Watches the first pass over the pairs.

    The noise rate is estimated after half of the first epoch and again at its end, from the margins
    of pairs that had not been trained on; later margins are memorised and never used. All ranks
    hold the same margins, and so the same estimate.

    Args:
        noise: Holds margins and estimate.
        records: Gathers the margins of all ranks.
        describe: One line on how the run ended.
        save_report: Writes the flip report to a directory, if there is anything to report.
        only_warns: Of the trainer: nothing here may end a run.
    """

    def __init__(
        self,
        noise: LabelNoise,
        records: PairRecords,
        describe: Callable[[TrainerState], str],
        save_report: Callable[[str], None],
        only_warns: OnlyWarns,
    ) -> None:
        self.noise = noise
        self.records = records
        self._describe = describe
        self._save_report = save_report
        self._only_warns = only_warns
        self._estimate_at: set[int] = set()

    def metrics(self) -> dict[str, float]:
        """`poprisk/noise_rate`, its interval, and how many are suspect.

        Trackers get the rate that fits best also where the margins do not tell one: the interval
        beside it says so.
        """
        estimate = self.noise.estimate
        if estimate is None:
            return {}
        with self._only_warns("poprisk/noise_rate is not logged"):
            values = {
                "noise_rate": estimate.reference_rate,
                "noise_rate_low": estimate.low,
                "noise_rate_high": estimate.high,
                "flips_suspected": float(self.noise.suspects().sum()),
            }
            return {f"poprisk/{name}": value for name, value in values.items()}
        return {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan the estimates, and continue from a checkpoint."""
        epoch = steps_per_epoch(kwargs.get("train_dataloader"), args.gradient_accumulation_steps)
        self._estimate_at = set() if epoch is None else {epoch // 2, epoch} - {0}
        if state.is_hyper_param_search:
            # Each trial starts with a model of its own, which has seen nothing.
            fresh = LabelNoise(len(self.noise.margins), loss=self.noise.loss)
            self.noise.load_state_dict(*fresh.state_dict())
        if state.global_step > 0:
            self._resume(state)
        if state.is_world_process_zero:
            self._say_what_is_missing(args, state, epoch)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Estimate in the middle and at the end of the first epoch."""
        if state.global_step in self._estimate_at:
            self._update(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put margins and estimate beside Trainer's files."""
        self._gather()
        with self._only_warns(
            f"{LABELS_FILE} is not in the checkpoint of step {state.global_step}",
            "the checkpoint is whole without it; resumed from there, no noise rate is estimated",
        ):
            directory = checkpoint_path(args, state)
            if not (state.is_world_process_zero and os.path.isdir(directory)):
                return
            tensors, text = self.noise.state_dict()
            with write_whole(os.path.join(directory, LABELS_FILE)) as path:
                save_file(tensors, path, metadata=text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the flip report and the noise rate, and say how the run ended."""
        self._gather()
        if self.noise.estimate is None:
            self._update(state.global_step)
        if not state.is_world_process_zero:
            return
        with self._only_warns(
            f"flip report and {NOISE_REPORT} of the run could not be written",
            "the model is not affected",
        ):
            self._report(run_directory(args, state), state)

    def _report(self, directory: str, state: TrainerState) -> None:
        line = self._describe(state)
        tqdm.write(f"poprisk: {line}", file=sys.stderr)  # leaves progress bars whole
        self._save_report(directory)
        estimate = self.noise.estimate
        report = {
            **(
                {"rate": None, "num_pairs": int(self.noise.margins.seen.sum())}
                if estimate is None
                else estimate.to_json()
            ),
            "method": "from margins of the first epoch, each before its pair was trained on",
            "estimated_at_step": self.noise.estimate_step,
            "rate_in_use": self.noise.rate,
            "loss": self.noise.loss.mode,
            "diagnosis": line,
        }
        with write_whole(os.path.join(directory, NOISE_REPORT)) as path:
            path.write_text(f"{json.dumps(report, indent=2, allow_nan=False)}\n", encoding="utf-8")

    def _say_what_is_missing(self, args: Any, state: TrainerState, epoch: int | None) -> None:
        """One line for each thing that this run cannot have. `args` is a `PopRiskDPOConfig`."""
        pairs = len(self.noise.margins)
        if args.noise != "off" and args.noise_rate is None:
            if not pairs:
                logger.warning(
                    "train_dataset is streamed: the noise rate is not estimated, and there is no "
                    "flip report."
                )
            elif pairs < FEWEST_PAIRS:
                logger.warning(
                    "train_dataset has %d pairs; an estimate of the noise rate needs %d. Give "
                    "noise_rate, or the loss stays that of DPO.",
                    pairs,
                    FEWEST_PAIRS,
                )
        watches = args.stop or args.noise != "off"
        if watches and pairs and epoch is not None and epoch < _FEWEST_STEPS:
            logger.warning(
                "One epoch of %d pairs has fewer than %d optimizer steps (batches of %d): the "
                "stop and the noise rate see too little. Use a smaller batch or more data.",
                pairs,
                _FEWEST_STEPS,
                batch_size_of(args, state) * args.gradient_accumulation_steps * args.world_size,
            )

    def _update(self, step: int) -> None:
        self._gather()
        with self._only_warns("the noise rate is not estimated", together=True):
            if int(self.noise.margins.margin.isfinite().sum()) >= FEWEST_PAIRS:
                self.noise.update_estimate(step)

    def _gather(self) -> None:
        with self._only_warns("the margins of some pairs are lost", together=True):
            self.records.flush()

    def _resume(self, state: TrainerState) -> None:
        directory = checkpoint_directory(state)
        path = None if directory is None else os.path.join(directory, LABELS_FILE)
        if path is None or not os.path.isfile(path):
            if state.is_world_process_zero:
                logger.warning(
                    "no %s in the checkpoint: which pairs were trained on is not known, so the "
                    "noise rate is not estimated.",
                    LABELS_FILE,
                )
            self._estimate_at = set()
            self.noise.margins.step.fill_(0)  # as if seen: none of them gets a margin any more
            return
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                self.noise.load_state_dict(tensors, file.metadata() or {})
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path!r} is damaged or of other data ({' '.join(str(error).split())}). Resume "
                "from another checkpoint, or delete the file: the noise rate is then not estimated."
            ) from error
