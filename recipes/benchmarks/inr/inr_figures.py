"""The images themselves, and the noise in them over training."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gate_harness.arms import ARMS
from gate_harness.figures import style_of
from gate_harness.tasks import Member
from gate_harness.training import train
from inr_task import SIDE, InrTask, clean_image, noisy_image, psnr
from torch import Tensor

__all__ = ["draw_images", "draw_noise"]

Trace = dict[str, np.ndarray]


class _Recorder(InrTask):
    """Keeps the images of all evaluations of its only member."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []

    def images(self, params: dict[str, Tensor]) -> Tensor:
        found = super().images(params)
        self.seen.append(found[0])
        return found


def draw_images(
    rows: Sequence[dict[str, float]],
    titles: Sequence[str],
    path: Path,
    *,
    condition: str,
    seed: int,
    schedule: dict,
) -> None:
    """One row of images for each choice of learning rates: clean, noisy, and what arms made of it.

    Args:
        rows: For each arm its learning rate; the first arm is shown at its best step too. Arms that
            are no control.
        titles: Of the rows.
        path: Of the picture.
        condition: The image.
        seed: Of noise, features, start and batches.
        schedule: `steps` and `eval_steps` of `InrTask`.
    """
    clean, noisy = clean_image(condition), noisy_image(condition, seed)
    columns = 3 + len(rows[0])
    fig, axes = plt.subplots(
        len(rows), columns, figsize=(2.1 * columns, 2.7 * len(rows)), squeeze=False, dpi=120
    )
    for line, rates, title in zip(axes, rows, titles, strict=True):
        shown = [("clean", clean), (f"noisy, {psnr(noisy, clean):.1f} dB", noisy)]
        for place, (arm, lr) in enumerate(rates.items()):
            task = _Recorder([Member(seed=seed, condition=condition, lr=lr)], **schedule)
            train(task, ARMS[arm])
            quality = [float(psnr(image, clean)) for image in task.seen]
            shown.append((f"{arm}, lr {lr:g}\nend, {quality[-1]:.1f} dB", task.seen[-1]))
            if place == 0:
                best = int(np.argmax(quality))
                step = [0, *task.eval_steps][best]
                shown.append(
                    (f"{arm}, lr {lr:g}\nstep {step}, {quality[best]:.1f} dB", task.seen[best])
                )
        for axis, (name, image) in zip(line, shown, strict=True):
            axis.imshow(image.view(SIDE, SIDE), cmap="gray", vmin=0, vmax=1)
            axis.set_title(name, fontsize=8)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, fontsize=9)
    fig.set_layout_engine("constrained")
    fig.savefig(path)
    plt.close(fig)


def draw_noise(traces: dict[str, Trace], path: Path, lrs: Sequence[float]) -> None:
    """PSNR against the share of the noise in the image, over training, one column for each rate.

    Mean over images and seeds; up and left is better. Where curves coincide, arms differ in speed
    alone.
    """
    fig, axes = plt.subplots(1, len(lrs), figsize=(1.6 + 3.4 * len(lrs), 4), dpi=120, sharey=True)
    for axis, lr in zip(axes, lrs, strict=True):
        for place, (arm, trace) in enumerate(traces.items()):
            here = np.isclose(trace["lr"], lr)
            x, y = (trace[name][:, here].mean(1) for name in ("noise_share", "psnr"))
            axis.plot(x, y, label=arm, lw=1.2, **style_of(place))
            axis.plot(x[-1], y[-1], "o", ms=4, color=style_of(place)["color"])
        axis.set(title=f"lr {lr:g}", xlabel="share of the noise in the image", ylim=(12, None))
        axis.grid(color="0.9")
    axes[0].set_ylabel("PSNR against the clean image, dB")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False)
    fig.set_layout_engine("constrained")
    fig.savefig(path)
    plt.close(fig)
