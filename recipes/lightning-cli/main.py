"""Digits with wrong labels, trained from a YAML file (LightningCLI).

Usage: python main.py {fit,test} --config config.yaml [--key value ...]
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Beside the logs, and not under the name of the file that one writes.
SAVED = {"config_filename": "settings.yaml", "overwrite": True}


class Classifier(L.LightningModule):
    """An MLP. It has no `configure_optimizers`: the optimizer is named in the YAML file.

    Args:
        width: Units of the hidden layer.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        right = (self.net(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("clean_accuracy", right)


class NoisyDigits(L.LightningDataModule):
    """scikit-learn's digits: 1,200 to train on, some with wrong labels, and 597 to test with.

    Args:
        wrong: Share of the training labels that are wrong, in [0, 1].
        batch_size: Images per batch.
        seed: Of the split and of the wrong labels.
    """

    def __init__(self, wrong: float = 0.3, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.wrong, self.batch_size, self.seed = wrong, batch_size, seed

    def setup(self, stage: str) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        images, labels = map(torch.tensor, load_digits(return_X_y=True))
        order = torch.randperm(len(labels), generator=draw)
        x, y = (images[order] / 16).float(), labels[order]
        other = (y + torch.randint(1, 10, y.shape, generator=draw)) % 10
        noisy = torch.where(torch.rand(len(y), generator=draw) < self.wrong, other, y)
        self.train = TensorDataset(x[:1200], noisy[:1200])
        self.clean = TensorDataset(x[1200:], y[1200:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.clean, batch_size=len(self.clean))


def main() -> LightningCLI:
    """Run the subcommand."""
    return LightningCLI(Classifier, NoisyDigits, save_config_kwargs=SAVED)


if __name__ == "__main__":
    main()
