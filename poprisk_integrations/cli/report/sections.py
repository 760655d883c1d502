"""Which charts stand under which heading."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from poprisk_integrations.cli.report.chart import Chart
from poprisk_integrations.cli.report.gate_charts import gate_charts
from poprisk_integrations.cli.report.loss_charts import loss_charts
from poprisk_integrations.cli.report.other_charts import other_charts
from poprisk_integrations.cli.report.preference_charts import preference_charts
from poprisk_integrations.cli.report.run import Run
from poprisk_integrations.cli.report.stop_charts import stop_charts

__all__ = ["Section", "sections_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading and what stands under it.

    Attributes:
        name: Identifier in the page.
        title: Heading.
        charts: In order.
        intro: A paragraph before them; "" for none.
        remarks: Paragraphs after them.
    """

    name: str
    title: str
    charts: Sequence[Chart]
    intro: str = ""
    remarks: Sequence[str] = field(default=())


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """All sections; one without content has no charts and no remarks."""
    others, constants, left_out = other_charts(runs)
    remarks = []
    if constants:
        remarks.append(f"Never changed: {', '.join(constants)}.")
    if left_out:
        remarks.append(f"Also logged, not drawn: {', '.join(left_out)}.")
    sections = [
        Section(name="loss", title="Loss and learning rate", charts=loss_charts(runs)),
        Section(name="stop", title="Signal and noise", charts=stop_charts(runs)),
        Section(name="gate", title="Gate", charts=gate_charts(runs)),
        Section(
            name="labels", title="Preferences and wrong labels", charts=preference_charts(runs)
        ),
        Section(name="other", title="Other logged values", charts=others, remarks=remarks),
    ]
    charts = [chart for section in sections for chart in section.charts]
    end = max((line.curve.steps[-1] for c in charts for line in c.lines), default=0.0)
    return [
        replace(section, charts=[replace(chart, last_step=end) for chart in section.charts])
        for section in sections
    ]
