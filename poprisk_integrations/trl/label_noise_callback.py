"""Estimates the noise rate at the right moment, logs it, saves it, and says how the run ended."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import TrainerState

from poprisk_integrations._files import write_whole
from poprisk_integrations.core.noise_rate import FEWEST_PAIRS
from poprisk_integrations.diagnostics.data_pass import batch_count
from poprisk_integrations.diagnostics.run_length import epoch_steps
from poprisk_integrations.distributed import world_size
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.huggingface.run_callback import MetricsCallback
from poprisk_integrations.huggingface.run_facts import (
    batch_size_of,
    checkpoint_directory,
    checkpoint_path,
    run_directory,
)
from poprisk_integrations.trl.label_noise import LARGEST_USED_RATE, LabelNoise
from poprisk_integrations.trl.pair_records import PairRecords

__all__ = ["LABELS_FILE", "NOISE_REPORT", "LabelNoiseCallback", "OnlyWarns", "describe_run"]

LABELS_FILE = "poprisk_labels.safetensors"
NOISE_REPORT = "poprisk_noise.json"
_FEWEST_STEPS = 4

logger = logging.getLogger(__name__)


class OnlyWarns:
    """Makes blocks whose exceptions become a warning, one for each thing that can fail.

    Bad input is refused before the first step; what fails later (a full disk, a number that is not
    finite) is our business and not that of the training around it.

    Example:
        >>> only_warns = OnlyWarns()
        >>> with only_warns("the flip report could not be written", "the model is saved"):
        ...     raise OSError("no space left")
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    @contextmanager
    def __call__(
        self, failure: str, kept: str = "training goes on", *, together: bool = False
    ) -> Iterator[None]:
        """Log what the block raises, once for each `failure`; `kept` is what is not affected.

        What all ranks do `together` raises among several processes: the others would wait in vain.
        """
        try:
            yield
        except Exception as error:
            if together and world_size() > 1:
                raise
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            self.once(f"{failure} ({cause}); {kept}.", topic=failure)

    def once(self, message: str, topic: str = "") -> None:
        """Log a warning, unless one of its topic (or the same) has been logged."""
        if (topic or message) not in self._known:
            self._known.add(topic or message)
            logger.warning("%s", message)


class LabelNoiseCallback(MetricsCallback):
    """Watches the first pass over the pairs.

    The noise rate is estimated after half of the first epoch and again at its end, from the margins
    of pairs that had not been trained on; later margins are memorised and never used. All ranks
    hold the same margins, and so the same estimate. `describe` gives one line on how the run ended,
    `save_report` writes the flip report to a directory, if there is anything to report.
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
        """`poprisk/noise_rate`, its interval, and how many are suspect."""
        estimate = self.noise.estimate
        if estimate is None:
            return {}
        with self._only_warns("poprisk/noise_rate is not logged"):
            return {
                # The one that fits best, also where the margins do not tell: the interval says so.
                "poprisk/noise_rate": estimate.reference_rate,
                "poprisk/noise_rate_low": estimate.low,
                "poprisk/noise_rate_high": estimate.high,
                "poprisk/flips_suspected": float(self.noise.suspects().sum()),
            }
        return {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Plan the estimates, and continue from a checkpoint."""
        batches = batch_count(kwargs.get("train_dataloader"))
        epoch = epoch_steps(batches, args.gradient_accumulation_steps)
        self._estimate_at = set() if epoch is None else {epoch // 2, epoch} - {0}
        self.records.takes_sitters = False
        if state.is_hyper_param_search:
            # Each trial starts with a model of its own, which has seen nothing.
            fresh = LabelNoise(len(self.noise.margins), loss=self.noise.loss)
            self.noise.load_state_dict(*fresh.state_dict())
        if state.global_step > 0:
            self._resume(state)
        if state.is_world_process_zero:
            self._say_what_is_missing(args, state, epoch)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """From here on pairs are measured because they sit out."""
        self.records.takes_sitters = True

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Estimate in the middle and at the end of the first epoch."""
        if state.global_step in self._estimate_at:
            self._update(state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
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

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
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
        if estimate is None:
            found = {"rate": None, "num_pairs": int(self.noise.margins.seen.sum())}
        else:
            found = estimate.to_json()
        report = {
            **found,
            "method": "from margins of the first epoch, each before its pair was trained on",
            "estimated_at_step": self.noise.estimate_step,
            "rate_in_use": self.noise.rate,
            "loss": self.noise.loss.mode,
            "diagnosis": line,
        }
        with write_whole(os.path.join(directory, NOISE_REPORT)) as path:
            path.write_text(f"{json.dumps(report, indent=2, allow_nan=False)}\n", encoding="utf-8")

    def _say_what_is_missing(self, args: Any, state: TrainerState, epoch: int | None) -> None:
        """One line for each thing that this run cannot have. `args` are `PairOptions`."""
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
                    "noise_rate, or the loss stays TRL's own and there is no flip report.",
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


def describe_run(
    noise: LabelNoise,
    callbacks: Iterable[Any] = (),
    state: TrainerState | None = None,
    *,
    flips_fitted: float | None = None,
) -> str:
    """What happened, for people: noise rate, suspects fitted, whether it memorises, what was kept.

    The first stop among the callbacks is asked; `flips_fitted` is the share of the suspect pairs
    that are ranked as labelled, if it is known.

    Example:
        >>> from poprisk_integrations.trl.label_noise import PairLoss
        >>> describe_run(LabelNoise(10, loss=PairLoss(mode="holder")))
        'noise rate not estimated; loss holder'
    """
    parts = ["noise rate not estimated" if noise.estimate is None else str(noise.estimate)]
    if noise.rate is not None:
        suspects = int(noise.suspects().sum()) if int(noise.margins.seen.sum()) else 0
        if suspects:
            fitted = "" if flips_fitted is None else f", {100 * flips_fitted:.0f} % of them fitted"
            parts.append(f"{suspects} suspect pairs{fitted}")
    lacking = noise.lacks_rate
    if lacking is not None:
        without = "labels are taken as right" if lacking == "weights" else "the loss is DPO's"
        parts.append(f"no noise rate for noise={lacking!r}: {without}")
    if noise.loss.mode != "off":
        rate = "" if noise.loss.mode == "holder" else f" at noise rate {noise.loss.noise_rate:.2f}"
        if noise.rate == LARGEST_USED_RATE and noise.estimate is not None:
            rate += ", the largest that is used"
        parts.append(f"loss {noise.loss.mode}{rate}")
    stops = [one for one in callbacks if isinstance(one, PopRiskEarlyStoppingCallback)]
    if stops:
        parts.append(stops[0].diagnosis.short)
    best = None if state is None else state.best_model_checkpoint
    kept = re.search(r"checkpoint-(\d+)$", best or "")
    if kept is not None:
        parts.append(f"kept step {kept.group(1)}")
    return "; ".join(parts)
