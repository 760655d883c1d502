"""A coordinate network fitted to the noisy pixels of a small grey image.

Two photographs that scikit-learn brings along, cropped and averaged to 64 x 64 pixels with values
in [0, 1]; Gaussian noise of sd `NOISE` on every pixel. A condition is an image.
"""

import functools
import itertools
import math

import torch
from gate_harness.tasks import Member, Task
from sklearn.datasets import load_sample_image
from torch import Tensor

__all__ = [
    "CONDITIONS",
    "SIDE",
    "InrTask",
    "clean_image",
    "features",
    "noise_share",
    "noisy_image",
    "psnr",
]

SIDE, NOISE = 64, 0.15
FREQUENCIES, BANDWIDTH = 64, 4.0  # sd of the frequencies, in periods per image
WIDTHS = (2 * FREQUENCIES, 64, 64, 1)
CORNERS = {"china": (20, 130), "flower": (20, 130)}  # of the crop, 384 x 384 pixels
CONDITIONS = tuple(CORNERS)
BATCH = 256
Params = dict[str, Tensor]


@functools.cache
def clean_image(name: str) -> Tensor:
    """Grey values in [0, 1] as a column of pixels, row by row, shape (SIDE * SIDE,)."""
    top, left = CORNERS[name]
    crop = load_sample_image(f"{name}.jpg")[top : top + 6 * SIDE, left : left + 6 * SIDE]
    # A photo has no noise of its own after a mean over 6 x 6 x 3 values.
    return torch.tensor(crop / 255.0).float().view(SIDE, 6, SIDE, 18).mean((1, 3)).flatten()


def noisy_image(name: str, seed: int) -> Tensor:
    """What is trained on; not cut off at 0 and 1, so that the noise has mean 0."""
    g = torch.Generator().manual_seed(20_000 + seed)
    return clean_image(name) + NOISE * torch.randn(SIDE * SIDE, generator=g)


def features(seed: int) -> Tensor:
    """Cosines and sines of random frequencies at the pixels' centres, (pixels, 2 FREQUENCIES)."""
    g = torch.Generator().manual_seed(10_000 + seed)
    frequency = BANDWIDTH * torch.randn(2, FREQUENCIES, generator=g)
    at = (torch.arange(SIDE) + 0.5) / SIDE
    phase = 2 * math.pi * torch.cartesian_prod(at, at) @ frequency
    return torch.cat([phase.cos(), phase.sin()], -1)


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1, over the last axis."""
    return -10 * (image - reference).square().mean(-1).log10()


def noise_share(image: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
    """Part of the noise that an image repeats: 0 none, 1 all; a regression on the noise."""
    noise = noisy - clean
    return ((image - clean) * noise).sum(-1) / noise.square().sum(-1)


class InrTask(Task):
    """Members with any images; those of a seed share features, start, noise and batches.

    Args:
        members: The models.
        steps: Of the run.
        eval_steps: When the whole image is rendered.
    """

    def __init__(self, members: list[Member], *, steps: int, eval_steps: list[int]) -> None:
        self.members, self.steps, self.eval_steps = members, steps, eval_steps
        self.seeds = list(dict.fromkeys(m.seed for m in members))
        self.place = torch.tensor([self.seeds.index(m.seed) for m in members])
        self.features = torch.stack([features(s) for s in self.seeds])
        self.clean = torch.stack([clean_image(m.condition) for m in members])
        self.noisy = torch.stack([noisy_image(m.condition, m.seed) for m in members])
        self.generators = [torch.Generator().manual_seed(40_000 + s) for s in self.seeds]
        self.order = torch.empty(0)

    def initial(self) -> Params:
        """He normal weights, biases 0; one draw for each seed."""
        drawn: dict[str, list[Tensor]] = {}
        for seed in self.seeds:
            g = torch.Generator().manual_seed(30_000 + seed)
            for i, (a, b) in enumerate(itertools.pairwise(WIDTHS)):
                weight = torch.randn(a, b, generator=g) * math.sqrt(2 / a)
                drawn.setdefault(f"w{i}", []).append(weight)
                drawn.setdefault(f"b{i}", []).append(torch.zeros(b))
        return {name: torch.stack(values)[self.place] for name, values in drawn.items()}

    @staticmethod
    def render(params: Params, x: Tensor) -> Tensor:
        """Grey values at features of shape (M, B, ...), shape (M, B)."""
        last = len(WIDTHS) - 2
        for i in range(last + 1):
            x = torch.baddbmm(params[f"b{i}"][:, None], x, params[f"w{i}"])
            x = x if i == last else x.relu()
        return x[..., 0]

    def losses(self, params: Params, step: int) -> Tensor:
        """Mean squared error on `BATCH` noisy pixels, without replacement within an epoch."""
        pixels = SIDE * SIDE
        within = step % (pixels // BATCH)
        if within == 0:
            self.order = torch.stack([torch.randperm(pixels, generator=g) for g in self.generators])
        rows = self.order[:, within * BATCH : (within + 1) * BATCH]
        x = self.features[torch.arange(len(self.seeds))[:, None], rows][self.place]
        target = self.noisy.gather(1, rows[self.place])
        return (self.render(params, x) - target).square().mean(1)

    def images(self, params: Params) -> Tensor:
        """Whole images, one member at a time: their features fit in the cache."""
        parts = [
            self.render(
                {name: p[m : m + 1] for name, p in params.items()}, self.features[k : k + 1]
            )
            for m, k in enumerate(self.place.tolist())
        ]
        return torch.cat(parts)

    def metrics(self, params: Params) -> dict[str, Tensor]:
        """Against the clean image, against the noisy one, and how much of the noise is there."""
        image = self.images(params)
        return {
            "psnr": psnr(image, self.clean),
            "fit": psnr(image, self.noisy),
            "noise_share": noise_share(image, self.clean, self.noisy),
        }

    def keep(self, index: Tensor) -> None:
        """Go on with these members only."""
        super().keep(index)
        self.place, self.clean, self.noisy = (
            x[index] for x in (self.place, self.clean, self.noisy)
        )
