"""Training, as every step that trains does it: seeded, stopped early, best and last epoch told apart, resumable."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from workbench.compression._base import NO_CHECKPOINT, Checkpoint
from workbench.compression._constraints import Constraint, KeepZeros
from workbench.compression._losses import Batch, Loss, are_probabilities, logits
from workbench.compression._plan import OPTIMISERS, Plan
from workbench.compression._run import Run, device_of
from workbench.data.task import Task
from workbench.deployment import physical_cores
from workbench.errors import Cancelled
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model

__all__ = [
    "OPTIMISERS",
    "Batch",
    "Constraint",
    "KeepZeros",
    "Loss",
    "Plan",
    "are_probabilities",
    "copied",
    "logits",
    "settled",
    "train",
]


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
        An epoch that begins its last update before this share of the training is done does not count as the best: a
        schedule is still under way. The last epoch always counts.
    seed
        Of the order of samples, augmentation, dropout and the held-out samples.
    checkpoint
        Saved to after each epoch; a training that was broken off goes on there, with the same result as if it had not
        been. Whoever keeps the step's result clears it afterwards.

    Returns
    -------
    Model
        `model` with a `Record` of each epoch: epoch, loss (mean over its updates), validation_loss and
        validation_accuracy (None where nothing is held out), learning_rate (of its first update), kept (the best).

    Raises
    ------
    TrainingDiverged
        If the loss or a weight stops being a finite number; it holds the best model so far.
    Cancelled
        If `progress` says so; it holds the best model so far in ``best``.
    StepError
        If every parameter is frozen, the outputs are not logits for the task's classes, or nothing is left to train on.
    """
    # an inference tensor made by the caller cannot be trained, so nothing of its mode may reach in here
    with torch.inference_mode(False), torch.enable_grad(), settled(seed, device_of(model)):
        run = Run(model, task, plan, step, loss, constraints, helpers, settled_from, seed)
        try:
            run.keep_in(checkpoint, progress)
            run.go(progress)
        except Cancelled as stop:
            raise run.cancelled(stop) from stop
        return run.best_model()


@contextmanager
def settled(seed: int, device: torch.device) -> Iterator[None]:
    """Seeded dropout and a known number of threads inside; torch's generators and threads as they were after."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        torch.set_num_threads(physical_cores())
        try:
            yield
        finally:
            torch.set_num_threads(threads)
