"""Supervised fine-tuning on the grammar: the reference policy of each seed, trained once."""

import time
from pathlib import Path

import numpy as np
import torch
from benchmarks.cleaned_pairs.language import all_prompts, grammar
from benchmarks.cleaned_pairs.model import Params, completion_log_probs, initial, mask_of

__all__ = ["references"]

SAMPLES, BATCH, EPOCHS, LR = 20_000, 64, 4, 3e-3


def references(seeds: list[int], folder: Path, samples: int = SAMPLES) -> Params:
    """Trained parameters, one member for each seed; those on disk are not trained again."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {seed: folder / f"sft_{seed}_{samples}.npz" for seed in seeds}
    missing = [seed for seed in seeds if not paths[seed].exists()]
    if missing:
        params = _train(missing, samples)
        for place, seed in enumerate(missing):
            temporary = paths[seed].with_suffix(".tmp.npz")
            np.savez(temporary, **{name: p[place].numpy() for name, p in params.items()})
            temporary.replace(paths[seed])
    found = []
    for seed in seeds:
        with np.load(paths[seed], allow_pickle=False) as file:
            found.append({name: torch.from_numpy(file[name]) for name in file.files})
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def _train(seeds: list[int], samples: int) -> Params:
    began = time.time()
    prompts, completions = [], []
    for seed in seeds:
        random = np.random.default_rng(10_000 + seed)
        asked = all_prompts()[random.integers(0, len(all_prompts()), samples)]
        prompts.append(asked)
        completions.append(grammar(asked, random))
    x, y = torch.tensor(np.stack(prompts)), torch.tensor(np.stack(completions))
    params = {name: p.requires_grad_() for name, p in initial(seeds).items()}
    optimizer = torch.optim.AdamW(list(params.values()), lr=LR, weight_decay=0.0, foreach=True)
    member = torch.arange(len(seeds))[:, None]
    generator = torch.Generator().manual_seed(5)
    total, step = EPOCHS * (samples // BATCH), 0
    loss = torch.zeros(len(seeds))
    for _ in range(EPOCHS):
        order = torch.rand(len(seeds), samples, generator=generator).argsort(1)
        for i in range(samples // BATCH):
            rows = order[:, i * BATCH : (i + 1) * BATCH]
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - step / total)
            log_probs = completion_log_probs(params, x[member, rows], y[member, rows])
            loss = -log_probs.sum(1) / mask_of(y[member, rows]).sum((1, 2))
            loss.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    found = ", ".join(f"{value:.3f}" for value in loss.tolist())
    print(f"SFT of {len(seeds)} seeds: {time.time() - began:.0f} s, loss {found}", flush=True)
    return {name: p.detach() for name, p in params.items()}
