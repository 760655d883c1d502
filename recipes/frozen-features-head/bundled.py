"""A frozen net and data that need no download: trained on the digits 0 to 4, used for 5 to 9."""

import torch
from sklearn.datasets import load_digits
from torch import nn

DIGITS = "bundled:digits"


def digits(_args) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
    """Features and labels of 300 digits to learn from and of the others to test with, and names."""
    draw = torch.Generator().manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=draw)
    images, labels = images[order].float() / 16, labels[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        net = nn.Sequential(body, nn.Linear(128, 5))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    x, y = images[labels < 5], labels[labels < 5]
    for _ in range(20):
        for batch in torch.randperm(len(y), generator=draw).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        features = body(images[labels >= 5])
    features = [features[:300], features[300:]]
    found = labels[labels >= 5] - 5
    return features, [found[:300], found[300:]], [str(digit) for digit in range(5, 10)]
