"""Trains the zoo's weights on the digits task, prints each test accuracy, and writes the shipped files with --write.

python tests/benchmarks/train_zoo.py [--write]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from workbench.data import Task, tasks
from workbench.models import zoo

EPOCHS = 80
BATCH = 64
FOLDER = Path(zoo.__file__).parent / "weights"


def split(task: Task, name: str) -> tuple[Tensor, Tensor]:
    """All preprocessed images of a split, (N, 1, 28, 28), and their labels."""
    images = task.inputs(name, task.count(name))[0]
    return torch.from_numpy(images), torch.from_numpy(np.asarray(task.labels(name)))


def shifted(x: Tensor, noise: torch.Generator, most: int = 2) -> Tensor:
    """Each image moved by up to `most` pixels in both directions."""
    padded = functional.pad(x, (most, most, most, most))
    down, right = torch.randint(0, 2 * most + 1, (2, len(x)), generator=noise)
    rows = (down[:, None] + torch.arange(x.shape[2]))[:, None, :, None]
    columns = (right[:, None] + torch.arange(x.shape[3]))[:, None, None, :]
    return padded[torch.arange(len(x))[:, None, None, None], 0, rows, columns]


def train(module: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> nn.Module:
    """Adam with a cosine schedule over shifted images."""
    noise = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(x) // BATCH)
    optimiser = torch.optim.Adam(module.parameters(), lr=2e-3, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    module.train()
    for _ in range(EPOCHS):
        for picked in torch.randperm(len(x), generator=noise).split(BATCH):
            loss = functional.cross_entropy(module(shifted(x[picked], noise)), y[picked], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return module.eval()


def main() -> None:
    """Train, round to float16 as shipped, and report."""
    task = tasks.digits()
    x, y = split(task, "train")
    x_test, y_test = split(task, "test")
    for name in [n for n, entry in zoo.ZOO.items() if entry.trained_on == task.name]:
        module = train(zoo.build(name), x, y).half().float()
        with torch.no_grad():
            accuracy = (module(x_test).argmax(1) == y_test).double().mean().item()
        print(f"{name}: {100 * accuracy:.2f} % of {len(y_test)} test images")
        if "--write" in sys.argv:
            state = {key: value.half().contiguous() for key, value in module.state_dict().items()}
            save_file(state, FOLDER / f"{name}-{task.name}.safetensors")


if __name__ == "__main__":
    main()
