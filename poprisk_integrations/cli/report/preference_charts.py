"""DPO on preferences of which some are wrong."""

from collections.abc import Sequence

from poprisk_integrations.cli.report.chart import Chart
from poprisk_integrations.cli.report.quantity_chart import quantity_chart
from poprisk_integrations.cli.report.run import Run

__all__ = ["PREFERENCE_BASES", "preference_charts"]

_KL_DATA = (
    "Mean log-ratio of policy to reference on the completions of the data. It is not the KL "
    "divergence, which is a mean over the policy's own samples: it can be negative, and falls "
    "while the policy moves away from the data's completions."
)
_MARGINS = {
    "poprisk/margin_p10": "p10",
    "poprisk/margin_p50": "p50",
}
_BY_KIND = {
    "poprisk/margin_p10_clean": "p10 clean",
    "poprisk/margin_p50_clean": "p50 clean",
    "poprisk/margin_p10_suspect": "p10 suspect",
    "poprisk/margin_p50_suspect": "p50 suspect",
}
_OTHERS = (
    "flips_fitted",
    "flips_suspected",
    "kl_data",
    "kl_on_policy",
    "noise_rate",
    "noise_rate_high",
    "noise_rate_low",
    "reward_accuracy",
)
PREFERENCE_BASES = frozenset(
    {*_MARGINS, *_BY_KIND, "rewards/accuracies"} | {f"poprisk/{name}" for name in _OTHERS}
)


def preference_charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of the section on preferences."""
    ours = any(run.family("poprisk/reward_accuracy") for run in runs)
    accuracy = "poprisk/reward_accuracy" if ours else "rewards/accuracies"
    share = (0.0, 1.0)
    return [
        *quantity_chart(
            runs,
            "Reward accuracy",
            {accuracy: ""},
            bounds=share,
            note="Pairs that are ranked as labelled, wrong labels included"
            + ("; ties count half." if ours else "; ties count as wrong."),
        ),
        *quantity_chart(
            runs,
            "Reward margins",
            _MARGINS,
            note="Quantiles over the pairs since the last log line: a tenth (p10) and half (p50) "
            "of them have a smaller margin.",
        ),
        *quantity_chart(
            runs,
            "Margins of clean and of suspect pairs",
            _BY_KIND,
            note="A pair is suspect if its label is more probably wrong than right.",
        ),
        *quantity_chart(
            runs,
            "Suspect pairs fitted",
            {"poprisk/flips_fitted": ""},
            bounds=share,
            note="Share of the suspect pairs that are ranked as labelled: near 1 wrong labels are "
            "memorised.",
        ),
        *quantity_chart(
            runs, "Drift on the data (kl_data)", {"poprisk/kl_data": ""}, note=_KL_DATA
        ),
        *quantity_chart(
            runs,
            "KL divergence (kl_on_policy)",
            {"poprisk/kl_on_policy": ""},
            note="Policy to reference, on the policy's own samples.",
        ),
        *quantity_chart(
            runs,
            "Estimated noise rate",
            {"poprisk/noise_rate": ""},
            band=("poprisk/noise_rate_low", "poprisk/noise_rate_high"),
            bounds=(0.0, 0.5),
            steps_hold=True,
            note="Share of wrong labels; the band is the 95 % interval. Where that is wider than "
            "0.25 the margins do not tell a rate, and the line is only what fits best. Estimated "
            "in the middle and at the end of the first epoch, and held.",
        ),
        *quantity_chart(
            runs,
            "Suspected flips",
            {"poprisk/flips_suspected": ""},
            steps_hold=True,
            note="Pairs whose label is more probably wrong than right.",
        ),
    ]
