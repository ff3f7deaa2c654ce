"""`Finetune`: a few epochs of training that recover what pruning cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from workbench.compression import _checks
from workbench.compression._base import Step
from workbench.data.task import Task
from workbench.deployment import physical_cores
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import inputs as model_inputs
from workbench.models.model import Model

_OPTIMISERS = ("adam", "sgd")
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Finetune(Step):
    """Train the network further on the task's training split, by cross-entropy under a cosine schedule.

    Weights that pruning set to zero stay zero. The module's first output is taken as ``(N, classes)`` logits; a network
    that ends in a softmax is recognised by its rows adding up to 1. The preprocessed training split is held in memory.

    Parameters
    ----------
    epochs
        Passes over the training split.
    learning_rate
        At the start; it falls to zero along half a cosine.
    batch_size
        Samples per update.
    optimizer
        ``adam``, or ``sgd`` with Nesterov momentum 0.9 (wants a learning rate about ten times larger).
    weight_decay
        L2 penalty: decoupled from the gradient under ``adam`` (AdamW).

    Raises
    ------
    StepError
        If a setting is out of range.

    Notes
    -----
    The same call gives the same weights bit for bit on the same machine: the order of samples and dropout are seeded,
    and it trains on as many threads as there are physical cores, whatever torch was set to before. Cosine schedule
    after Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts.
    """

    epochs: int = 2
    learning_rate: float = 2e-3
    batch_size: int = 32
    optimizer: str = field(default="adam", metadata={"choices": _OPTIMISERS})
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _checks.whole("Finetune", "epochs", self.epochs)
        _checks.number("Finetune", "learning_rate", self.learning_rate, 0)
        _checks.whole("Finetune", "batch_size", self.batch_size)
        _checks.choice("Finetune", "optimizer", self.optimizer, _OPTIMISERS)
        _checks.number("Finetune", "weight_decay", self.weight_decay, 0, low_allowed=True)

    @property
    def label(self) -> str:
        """``Finetune 2 epochs``."""
        return f"Finetune {self.epochs} epoch{'s' if self.epochs > 1 else ''}"

    def check(self, model: Model) -> None:
        """Refuse a model without a float32 torch module."""
        _checks.trainable("Finetune", model, "wb.Finetune()")

    def apply(self, model: Model, task: Task, *, seed: int = 0, progress: Progress = SILENT) -> Model:
        """The trained model; raises `StepError` where the loss stops being a number or the outputs are not logits."""
        self.check(model)
        inputs, labels = task.inputs("train", task.count("train")), task.labels("train")
        samples = [torch.from_numpy(array) for array in inputs]
        # an inference tensor made by the caller cannot be trained, so nothing of its mode may reach in here
        with torch.inference_mode(False), torch.enable_grad(), _settled(seed):
            module = copy.deepcopy(model.module)
            trained = model.changed("", module=module)
            self._train(trained, samples, torch.from_numpy(labels), _zeros(model, module), seed, progress)
            module.eval()
        return trained

    def _train(
        self,
        model: Model,
        samples: list[Tensor],
        labels: Tensor,
        zeros: list[tuple[nn.Parameter, Tensor]],
        seed: int,
        progress: Progress,
    ) -> None:
        parameters = [p for p in model.module.parameters() if p.requires_grad]
        if not parameters:
            raise StepError(f"Every parameter of {model.name} is frozen; set requires_grad on those to train.")
        order = torch.Generator().manual_seed(seed)
        batches = list(_batches(len(labels), self.batch_size))
        optimiser, total = self._optimiser(parameters), self.epochs * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda done: 0.5 * (1 + math.cos(math.pi * done / total))
        )
        model.module.train()
        done = 0
        for epoch in range(self.epochs):
            shuffled = torch.randperm(len(labels), generator=order)
            for batch in batches:
                progress(done / total, f"epoch {epoch + 1} of {self.epochs}")
                chosen = shuffled[batch]
                loss = _loss(model.run_module(*(x[chosen] for x in samples)), labels[chosen])
                if not bool(torch.isfinite(loss)):
                    raise StepError(
                        f"The loss is {float(loss.detach())} at epoch {epoch + 1}; nothing of this training is kept. "
                        f"Give a learning_rate below {self.learning_rate:g}."
                    )
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                with torch.no_grad():
                    for parameter, mask in zeros:
                        parameter.mul_(mask)
                done += 1
        progress(1.0)

    def _optimiser(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=_MOMENTUM, nesterov=True, weight_decay=self.weight_decay
        )


@contextmanager
def _settled(seed: int) -> Iterator[None]:
    """Seeded dropout and a known number of threads inside; torch's generator and threads as they were after."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        torch.set_num_threads(physical_cores())
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _zeros(model: Model, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Weights that hold pruned zeros, each with the mask that keeps them; a layer that is all zero may still learn."""
    if "pruned" not in model.changes:
        return []
    weights = [layer.weight for layer in module.modules() if isinstance(layer, _checks.WEIGHTED)]
    masks = [(weight, weight.detach() != 0) for weight in weights]
    return [(p, mask) for p, mask in masks if bool(mask.any()) and not bool(mask.all())]


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        # batch normalisation has no variance over a single sample
        if start == 0 or count - start > 1:
            yield slice(start, start + size)


def _loss(output: object, labels: Tensor) -> Tensor:
    scores = model_inputs.outputs(output)[0]
    if scores.dim() != 2 or not scores.is_floating_point() or len(scores) != len(labels):
        raise StepError(
            "Finetune trains a classifier whose first output is (N, classes) logits; this network gives "
            f"{str(scores.dtype).removeprefix('torch.')} {tuple(scores.shape)} for {len(labels)} samples."
        )
    if int(labels.max()) >= scores.shape[1]:
        raise StepError(
            f"The task has a label {int(labels.max())}, but the network has {scores.shape[1]} outputs. "
            "Give a network with one output per class."
        )
    rows = scores.detach()
    if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
        return functional.nll_loss(scores.clamp_min(1e-12).log(), labels)
    return functional.cross_entropy(scores, labels)
