"""What a training minimises: the cross-entropy of a classifier by default, and what any loss is computed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from workbench.errors import StepError
from workbench.models import inputs as model_inputs


@dataclass(frozen=True)
class Batch:
    """What a loss is computed on besides the outputs.

    Attributes
    ----------
    inputs
        As the network was given them, batch axis first.
    labels
        ``(n,)`` int64.
    indices
        ``(n,)`` int64, the samples' numbers in the task's training split.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor


Loss = Callable[[Any, Batch], Tensor]


def logits(step: str, output: Any, labels: Tensor) -> Tensor:
    """The first output as ``(N, classes)`` scores that `labels` can index; a `StepError` where it is none."""
    scores = model_inputs.outputs(output)[0]
    if scores.dim() != 2 or not scores.is_floating_point() or len(scores) != len(labels):
        raise StepError(
            f"{step} trains a classifier whose first output is (N, classes) logits; this network gives "
            f"{str(scores.dtype).removeprefix('torch.')} {tuple(scores.shape)} for {len(labels)} samples."
        )
    check_labels(scores, labels)
    return scores.float()


def check_labels(scores: Tensor, labels: Tensor) -> None:
    """Refuse labels that ``(N, classes)`` scores have no column for."""
    if int(labels.max()) >= scores.shape[1]:
        raise StepError(
            f"The task has a label {int(labels.max())}, but the network has {scores.shape[1]} outputs. "
            "Give a network with one output per class."
        )


def are_probabilities(scores: Tensor) -> bool:
    """Whether rows add up to 1 and nothing is negative, as after a softmax."""
    rows = scores.detach()
    return bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all())


def cross_entropy(of_probabilities: bool) -> Loss:
    """Cross-entropy, in nats, of the first output as logits or as probabilities.

    Which of the two is told once, from many samples: a look at each batch costs time, and a small one may add up to 1
    by chance.
    """

    def loss(output: Any, batch: Batch) -> Tensor:
        scores = model_inputs.outputs(output)[0].float()
        if of_probabilities:
            return functional.nll_loss(scores.clamp_min(1e-12).log(), batch.labels)
        return functional.cross_entropy(scores, batch.labels)

    return loss
