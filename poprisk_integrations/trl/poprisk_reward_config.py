"""Settings of PopRiskRewardTrainer: TRL's, our optimizer, the noise report, and the stop."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

from dataclasses import dataclass

from trl import RewardConfig

from poprisk_integrations.trl.pair_options import PairOptions, option

__all__ = ["PopRiskRewardConfig"]

_MODES = ("off", "auto")


@dataclass
class PopRiskRewardConfig(PairOptions, RewardConfig):
    """`trl.RewardConfig` for preference data with wrong labels: report, optimizer and stop.

    With `optim="adamw_torch", noise="off", stop=False` training is that of `trl.RewardTrainer`, bit
    for bit. The loss is TRL's in any case.

    Args:
        optim: Any name that transformers knows; `poprisk_adamw` by default, with `optim_args` and
            the gate of `PopRiskDPOConfig`.
        noise: "auto": data that no method could learn from are refused, and the noise rate is
            estimated in the first epoch. "off": nothing is refused that `trl.RewardTrainer` trains
            on; the rate is estimated as well.
        noise_rate: Share of wrong labels in [0, 0.5), if it is known, for the flip report; None to
            estimate it.
        pair_id_column: Column with a unique id per pair, for the flip report; None to call pairs
            by their row number.
        stop: Add `PopRiskEarlyStoppingCallback`, with the options below, unless one was passed to
            the trainer. It estimates loss, reward accuracy and reward margin on pairs that were
            never trained on, along the run and without an eval set.
        stop_criterion: "risk" (the estimated test loss), "signal" (the gradients carry only noise),
            or "auto": "risk" where it can be had. `PopRiskDPOConfig` says more on these options.
        stop_sit_out: Of "risk": share of the pairs that join late, in (0, 0.5].
        stop_patience: Of "risk": windows without a smaller estimate before the stop, >= 1.
        stop_kappa: Of "signal": stop at this multiple of the onset time, >= 1.
        stop_window: Of "signal": optimizer steps per window, >= 4, or "auto".
        stop_threshold: Of "signal": the onset is where the statistic falls below this, > 0.
        stop_min_steps: No stop before this many optimizer steps.
        stop_action: "stop", "cooldown", "monitor", or None for what suits the criterion.
        stop_restore: Which checkpoint is the run's best: "best", "stop", "onset" or None.

    Raises:
        ValueError: If an option is outside its range.
    """

    noise: str = option(
        "auto", "'auto' also refuses pairs that nothing can be learned from.", _MODES
    )

    def __post_init__(self) -> None:
        self._check_noise_mode(_MODES, without_rate=("off",))
        self._check_stop()
        super().__post_init__()
        self.optim_args = self._with_gate(self.optim_args)
