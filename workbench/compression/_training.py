"""Training, as every step that trains does it: seeded, stopped early, best and last epoch told apart, resumable."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from workbench.compression._base import NO_CHECKPOINT, Checkpoint
from workbench.data.task import Task
from workbench.deployment import physical_cores
from workbench.errors import Cancelled, StepError, TrainingDiverged
from workbench.jobs import SILENT, Progress
from workbench.models import inputs as model_inputs
from workbench.models.model import Model
from workbench.models.record import Record

OPTIMISERS = ("adam", "sgd")
_MOMENTUM = 0.9
_VALIDATION_BATCH = 256


@dataclass(frozen=True)
class Plan:
    """How to train; the settings of a step that trains have the same names and meaning."""

    epochs: int
    learning_rate: float
    batch_size: int = 32
    optimizer: str = "adam"
    weight_decay: float = 0.0
    patience: int = 0
    validation: float = 0.1
    mixed_precision: bool = False


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


class Constraint:
    """What must hold of the weights while they are trained; the base class asks nothing."""

    def before_update(self, share: float) -> None:
        """Called before each update with the share of the training done, 0 to 1."""

    def after_update(self) -> None:
        """Called after each update, without gradients: put the weights back to where they may be."""


class KeepZeros(Constraint):
    """Weights that pruning set to zero stay zero; a layer that is all zero may still learn."""

    def __init__(self, weights: Sequence[nn.Parameter]):
        masks = [(weight, weight.detach() != 0) for weight in weights]
        self._masks = [(w, mask) for w, mask in masks if bool(mask.any()) and not bool(mask.all())]

    def after_update(self) -> None:
        for weight, mask in self._masks:
            weight.mul_(mask)


def copied(model: Model) -> Model:
    """`model` with a module of its own that can be trained, whatever mode the caller is in."""
    with torch.inference_mode(False):
        return replace(model, module=copy.deepcopy(model.module), graph=None)


def train(
    model: Model,
    task: Task,
    plan: Plan,
    *,
    step: str,
    loss: Loss | None = None,
    constraints: Sequence[Constraint] = (),
    helpers: Sequence[nn.Module] = (),
    settled_from: float = 0.0,
    seed: int = 0,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> Model:
    """Train the model's module, in place, on the task's training split under a cosine schedule.

    Parameters
    ----------
    model
        As `copied` gives it. Its module is left in evaluation mode with the weights of the best epoch.
    plan
        How. Where `Plan.validation` is above 0, that share of the training split is held out, drawn with `seed`, and
        the best epoch is the one most accurate on it (of equals the one of smaller loss, then the later one); where it
        is 0 the last epoch is taken.
    step
        Label of the step that trains, for its record and its errors.
    loss
        Of the module's output and a `Batch`; by default cross-entropy on the first output as ``(N, classes)`` logits,
        a network that ends in a softmax being recognised by its rows adding up to 1.
    constraints
        What must hold of the weights at each update.
    helpers
        Modules the loss uses that are trained along and thrown away: projections.
    settled_from
        Epochs that end before this share of the training do not count as the best: a schedule is still under way.
    seed
        Of the order of samples, augmentation, dropout and the held-out samples.
    checkpoint
        Saved to after each epoch; a training that was broken off goes on there, with the same result as if it had not
        been.

    Returns
    -------
    Model
        `model` with a `Record` of each epoch: epoch, loss, validation_loss, validation_accuracy, learning_rate, kept.

    Raises
    ------
    TrainingDiverged
        If the loss stops being a number; it holds the best model so far.
    Cancelled
        If `progress` says so; it holds the best model so far in ``best``.
    StepError
        If every parameter is frozen, or the outputs are not logits for the task's classes.
    """
    # an inference tensor made by the caller cannot be trained, so nothing of its mode may reach in here
    with torch.inference_mode(False), torch.enable_grad(), _settled(seed):
        run = _Run(model, task, plan, step, loss or _classification(step), constraints, helpers, settled_from, seed)
        run.restore(checkpoint.load())
        try:
            run.go(progress, checkpoint)
        except Cancelled as stop:
            stop.best = run.best_model()
            raise
        checkpoint.clear()
        return run.best_model()


class _Run:
    def __init__(
        self,
        model: Model,
        task: Task,
        plan: Plan,
        step: str,
        loss: Loss,
        constraints: Sequence[Constraint],
        helpers: Sequence[nn.Module],
        settled_from: float,
        seed: int,
    ):
        self.model, self.task, self.plan, self.step, self.loss = model, task, plan, step, loss
        self.constraints, self.settled_from = constraints, settled_from
        self.trained = nn.ModuleList([model.module, *helpers])
        parameters = [p for p in self.trained.parameters() if p.requires_grad]
        if not parameters:
            raise StepError(f"Every parameter of {model.name} is frozen; set requires_grad on those to train.")
        self.samples = [torch.from_numpy(x) for x in task.inputs("train", task.count("train"))]
        self.labels = torch.from_numpy(task.labels("train"))
        self.order = torch.Generator().manual_seed(seed)
        self.noise = np.random.default_rng(seed)
        mixed = torch.randperm(len(self.labels), generator=self.order)
        held = round(plan.validation * len(mixed))
        self.held_out, self.used = mixed[:held].sort().values, mixed[held:].sort().values
        self.batches = list(_batches(len(self.used), plan.batch_size))
        self.total = plan.epochs * len(self.batches)
        self.optimiser = _optimiser(plan, parameters)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda done: 0.5 * (1 + math.cos(math.pi * done / self.total))
        )
        self.rows: list[dict[str, Any]] = []
        self.best = -1
        self.best_state: dict[str, Tensor] = {}

    def go(self, progress: Progress, checkpoint: Checkpoint) -> None:
        for epoch in range(len(self.rows), self.plan.epochs):
            if self._waited_enough():
                break
            self._epoch(epoch, progress)
            checkpoint.save(self._saved())
        progress(1.0)

    def _epoch(self, epoch: int, progress: Progress) -> None:
        self.trained.train()
        shuffled = self.used[torch.randperm(len(self.used), generator=self.order)]
        losses = []
        for number, batch in enumerate(self.batches):
            done = epoch * len(self.batches) + number
            progress(done / self.total, f"epoch {epoch + 1} of {self.plan.epochs}")
            for constraint in self.constraints:
                constraint.before_update(done / self.total)
            losses.append(self._update(shuffled[batch], epoch))
        row = {"epoch": epoch + 1, "loss": float(np.mean(losses)), **self._validated()}
        self.rows.append({**row, "learning_rate": self.schedule.get_last_lr()[0]})
        if (epoch + 1) / self.plan.epochs >= self.settled_from and self._is_best():
            self.best = epoch
            self.best_state = {k: v.detach().clone() for k, v in self.model.module.state_dict().items()}

    def _update(self, chosen: Tensor, epoch: int) -> float:
        inputs = tuple(x[chosen] for x in self.samples)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.mixed_precision):
            loss = self.loss(self.model.run_module(*inputs), Batch(inputs, self.labels[chosen], chosen))
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(
                f"{self.step}: the loss is {float(loss.detach())} in epoch {epoch + 1}. {self._kept_so_far()} Give a "
                f"learning_rate below {self.plan.learning_rate:g}.",
                self.best_model() if self.best >= 0 else None,
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        with torch.no_grad():
            for constraint in self.constraints:
                constraint.after_update()
        return float(loss.detach())

    def _validated(self) -> dict[str, float]:
        """Loss and accuracy on the held-out samples; NaN where none are held out."""
        if not len(self.held_out):
            return {"validation_loss": math.nan, "validation_accuracy": math.nan}
        self.trained.eval()
        losses, right = 0.0, 0
        with torch.no_grad():
            for chosen in self.held_out.split(_VALIDATION_BATCH):
                inputs, labels = tuple(x[chosen] for x in self.samples), self.labels[chosen]
                outputs = self.model.run_module(*inputs)
                losses += float(self.loss(outputs, Batch(inputs, labels, chosen))) * len(chosen)
                right += int((model_inputs.outputs(outputs)[0].argmax(-1) == labels).sum())
        count = len(self.held_out)
        return {"validation_loss": losses / count, "validation_accuracy": right / count}

    def _is_best(self) -> bool:
        if self.best < 0 or not len(self.held_out):
            return True
        now, best = self.rows[-1], self.rows[self.best]
        return (now["validation_accuracy"], -now["validation_loss"]) >= (
            best["validation_accuracy"],
            -best["validation_loss"],
        )

    def _waited_enough(self) -> bool:
        return bool(self.plan.patience) and self.best >= 0 and len(self.rows) - 1 - self.best >= self.plan.patience

    def _kept_so_far(self) -> str:
        if self.best < 0:
            return "No epoch was finished before, so nothing is kept."
        return f"The best epoch before it, {self.best + 1}, is kept in the error's `best`."

    def best_model(self) -> Model:
        """The model of the best epoch, with its record; before there is one, the model as it stands."""
        if self.best_state:
            self.model.module.load_state_dict(self.best_state)
        self.model.module.eval()
        rows = [{**row, "kept": number == self.best} for number, row in enumerate(self.rows)]
        record = Record.of(self.step, "training, by epoch", rows)
        return replace(self.model, records=(*self.model.records, record))

    def _saved(self) -> bytes:
        file = io.BytesIO()
        torch.save(
            {
                "trained": self.trained.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
                "order": self.order.get_state(),
                "random": torch.random.get_rng_state(),
                "noise": self.noise.bit_generator.state,
                "rows": self.rows,
                "best": self.best,
                "best_state": self.best_state,
            },
            file,
        )
        return file.getvalue()

    def restore(self, data: bytes | None) -> None:
        """Go on where `_saved` was called."""
        if data is None:
            return
        kept = torch.load(io.BytesIO(data), weights_only=True)
        self.trained.load_state_dict(kept["trained"])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **kept["schedule"]})
        self.order.set_state(kept["order"])
        torch.random.set_rng_state(kept["random"])
        self.noise.bit_generator.state = kept["noise"]
        self.rows, self.best, self.best_state = kept["rows"], kept["best"], kept["best_state"]


def _optimiser(plan: Plan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if plan.optimizer == "adam":
        return torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    return torch.optim.SGD(
        parameters, lr=plan.learning_rate, momentum=_MOMENTUM, nesterov=True, weight_decay=plan.weight_decay
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


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        # batch normalisation has no variance over a single sample
        if start == 0 or count - start > 1:
            yield slice(start, start + size)


def logits(step: str, output: Any, labels: Tensor) -> Tensor:
    """The first output as ``(N, classes)`` scores that `labels` can index; a `StepError` where it is none."""
    scores = model_inputs.outputs(output)[0]
    if scores.dim() != 2 or not scores.is_floating_point() or len(scores) != len(labels):
        raise StepError(
            f"{step} trains a classifier whose first output is (N, classes) logits; this network gives "
            f"{str(scores.dtype).removeprefix('torch.')} {tuple(scores.shape)} for {len(labels)} samples."
        )
    if int(labels.max()) >= scores.shape[1]:
        raise StepError(
            f"The task has a label {int(labels.max())}, but the network has {scores.shape[1]} outputs. "
            "Give a network with one output per class."
        )
    return scores.float()


def are_probabilities(scores: Tensor) -> bool:
    """Whether rows add up to 1 and nothing is negative, as after a softmax."""
    rows = scores.detach()
    return bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all())


def _classification(step: str) -> Loss:
    def loss(output: Any, batch: Batch) -> Tensor:
        scores = logits(step, output, batch.labels)
        if are_probabilities(scores):
            return functional.nll_loss(scores.clamp_min(1e-12).log(), batch.labels)
        return functional.cross_entropy(scores, batch.labels)

    return loss
