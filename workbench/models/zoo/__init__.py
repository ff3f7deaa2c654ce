"""The zoo: our own small networks by name; a new one is a file and one line in `ZOO`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workbench.errors import LoadError, nearest
from workbench.models.zoo.dense import lenet300, mlp
from workbench.models.zoo.lenet import cifarnet, lenet5, lenet5_caffe, lenet5_quarter
from workbench.models.zoo.resnet import resnet
from workbench.models.zoo.transformer import transformer

_WEIGHTS = Path(__file__).parent / "weights"
_SEED = 0


@dataclass(frozen=True)
class Entry:
    """How to build one network.

    Attributes
    ----------
    build
        Makes the module with its random initial weights.
    shape
        Shape of one sample, without the batch axis; float32, or int64 where it takes ids.
    trained_on
        Name of the task its shipped weights were trained on; empty where none are shipped.
    vocabulary
        How many ids it takes, from 0 on; 0 for a network that takes numbers.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    trained_on: str = ""
    vocabulary: int = 0


ZOO: dict[str, Entry] = {
    "lenet5": Entry(lenet5, (1, 28, 28), "digits"),
    "lenet5-caffe": Entry(lenet5_caffe, (1, 28, 28)),
    "lenet5-quarter": Entry(lenet5_quarter, (1, 28, 28)),
    "lenet300": Entry(lenet300, (1, 28, 28), "digits"),
    "mlp": Entry(mlp, (1, 28, 28), "digits"),
    "cifarnet": Entry(cifarnet, (3, 32, 32)),
    "resnet20": Entry(lambda: resnet(20), (3, 32, 32)),
    "resnet32": Entry(lambda: resnet(32), (3, 32, 32)),
    "resnet44": Entry(lambda: resnet(44), (3, 32, 32)),
    "resnet56": Entry(lambda: resnet(56), (3, 32, 32)),
    "transformer": Entry(transformer, (32,), vocabulary=8192),
}


def entry(name: str) -> Entry:
    """The zoo's entry of that name; a `LoadError` with the nearest names where there is none."""
    if name not in ZOO:
        raise LoadError(f"The zoo has no network {name!r}. {nearest(name, ZOO)}")
    return ZOO[name]


def build(name: str, seed: int = _SEED) -> nn.Module:
    """The network with random weights, the same for a seed each time; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return entry(name).build().eval()


def trained(name: str, weights: str | None) -> tuple[nn.Module, str]:
    """The network with the weights asked for, and what they are in words.

    Parameters
    ----------
    name
        A name in `ZOO`.
    weights
        Name of the task they were trained on, or ``random``; None for the shipped ones where there are any.

    Raises
    ------
    LoadError
        If the network or the weights are not in the zoo.
    """
    known = entry(name)
    accepted = ["random", *([known.trained_on] if known.trained_on else [])]
    chosen = weights or known.trained_on or "random"
    if chosen not in accepted:
        raise LoadError(
            f"{name} has no weights {chosen!r} in the zoo. {nearest(chosen, accepted)} "
            f"A file of weights is loaded the other way round: wb.load(FILE, architecture={name!r})."
        )
    module = build(name)
    if chosen == "random":
        return module, f"random (seed {_SEED})"
    # kept as float16, which halves the package; the networks compute in float32
    state = load_file(_WEIGHTS / f"{name}-{chosen}.safetensors")
    module.load_state_dict({key: value.float() for key, value in state.items()})
    return module, chosen


def example(name: str) -> dict[str, Tensor]:
    """Two samples of noise from 0 to 1, or of ids above 0, the same ones each time."""
    noise, known = torch.Generator().manual_seed(_SEED), entry(name)
    if known.vocabulary:
        return {"x": torch.randint(1, known.vocabulary, (2, *known.shape), generator=noise)}
    return {"x": torch.rand(2, *known.shape, generator=noise)}
