"""One training under way: its epochs, the best of them, and what it saves to go on from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compression import _snapshot
from workbench.compression._base import NO_CHECKPOINT, Checkpoint
from workbench.compression._constraints import Constraint
from workbench.compression._losses import Batch, Loss, are_probabilities, check_labels, cross_entropy, logits
from workbench.compression._plan import Plan, reduced_precision
from workbench.compression._samples import Samples
from workbench.data.task import Task
from workbench.errors import Cancelled, StepError, TrainingDiverged
from workbench.jobs import Progress
from workbench.models import inputs as model_inputs
from workbench.models.model import Model
from workbench.models.record import Record


class Run:
    """One training under way; the arguments are those of `_training.train`."""

    def __init__(
        self,
        model: Model,
        task: Task,
        plan: Plan,
        step: str,
        loss: Loss | None,
        constraints: Sequence[Constraint],
        helpers: Sequence[nn.Module],
        settled_from: float,
        seed: int,
    ):
        self.model, self.task, self.plan, self.step, self.seed = model, task, plan, step, seed
        self.constraints, self.settled_from = constraints, settled_from
        self.trained = nn.ModuleList([model.module, *helpers])
        self.parameters = {name: p for name, p in self.trained.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise StepError(f"Every parameter of {model.name} is frozen; set requires_grad on those to train.")
        device = device_of(model)
        self.samples = Samples(task, plan.batch_size, plan.validation, seed, step, device)
        self.loss = loss or self._classification()
        self.total = plan.epochs * self.samples.updates
        self.optimiser = plan.optimiser(self.parameters.values())
        self.precision = reduced_precision(device)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=plan.mixed_precision and self.precision == torch.float16
        )
        self.checkpoint = NO_CHECKPOINT
        self.identity = ""
        self.rows: list[dict[str, Any]] = []
        self.best = -1
        self.best_state: dict[str, Tensor] = {}

    def _classification(self) -> Loss:
        batch = self.samples.first()
        self.trained.eval()
        with torch.no_grad():
            scores = logits(self.step, self.model.run_module(*batch.inputs), batch.labels)
        check_labels(scores, self.samples.labels)
        return cross_entropy(are_probabilities(scores))

    def go(self, progress: Progress) -> None:
        """Train until the last epoch, or until patience ends."""
        while not self._ended():
            self._epoch(len(self.rows), progress)
            if self.checkpoint is not NO_CHECKPOINT:
                self.checkpoint.save(_snapshot.pack(self._state()))
        progress(1.0)

    def _epoch(self, epoch: int, progress: Progress) -> None:
        self.trained.train()
        first, words, losses = epoch * self.samples.updates, f"epoch {epoch + 1} of {self.plan.epochs}", 0.0
        for number, batch in enumerate(self.samples.epoch()):
            share = (first + number) / self.total
            progress(share, f"{words}, loss {losses / number:.4f}" if number else words)
            for constraint in self.constraints:
                constraint.before_update(share)
            losses += self._update(batch, epoch, share)
        row = {"epoch": epoch + 1, "loss": losses / self.samples.updates, **self._validated(epoch)}
        self.rows.append({**row, "learning_rate": self.plan.rate(first / self.total)})
        if (share >= self.settled_from or epoch + 1 == self.plan.epochs) and self._is_best():
            self.best = epoch
            self.best_state = {k: v.detach().clone() for k, v in self.model.module.state_dict().items()}

    def _update(self, batch: Batch, epoch: int, share: float) -> float:
        with torch.autocast(batch.labels.device.type, self.precision, enabled=self.plan.mixed_precision):
            loss = self.loss(self.model.run_module(*batch.inputs), batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}", epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate(share)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        for constraint in self.constraints:
            constraint.after_gradients()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        with torch.no_grad():
            for constraint in self.constraints:
                constraint.after_update()
        return value

    def _validated(self, epoch: int) -> dict[str, float | None]:
        """Loss and accuracy on the held-out samples; None where none are held out."""
        # the last update may have spoilt what no loss was computed with any more
        for name, weight in self.parameters.items():
            if not bool(torch.isfinite(weight).all()):
                raise self._diverged(f"{name.partition('.')[2]!r} holds NaN or infinity", epoch)
        if not len(self.samples.held_out):
            return {"validation_loss": None, "validation_accuracy": None}
        self.trained.eval()
        losses, right, count = 0.0, 0, len(self.samples.held_out)
        with torch.no_grad():
            for batch in self.samples.validation():
                outputs = self.model.run_module(*batch.inputs)
                losses += float(self.loss(outputs, batch)) * len(batch.labels)
                right += int((model_inputs.outputs(outputs)[0].argmax(-1) == batch.labels).sum())
        if not math.isfinite(losses):
            raise self._diverged(f"the loss on the held-out samples is {losses}", epoch)
        return {"validation_loss": losses / count, "validation_accuracy": right / count}

    def _is_best(self) -> bool:
        if self.best < 0 or not len(self.samples.held_out):
            return True
        now, best = self.rows[-1], self.rows[self.best]
        return (now["validation_accuracy"], -now["validation_loss"]) >= (
            best["validation_accuracy"],
            -best["validation_loss"],
        )

    def _ended(self) -> bool:
        patience, since = self.plan.patience, len(self.rows) - 1 - self.best
        return len(self.rows) == self.plan.epochs or (bool(patience) and self.best >= 0 and since >= patience)

    def best_model(self) -> Model:
        """The model of the best epoch, with its record; there must be one."""
        self.model.module.load_state_dict(self.best_state)
        self.model.module.eval()
        for parameter in self.parameters.values():
            parameter.grad = None
        rows = [{**row, "kept": number == self.best} for number, row in enumerate(self.rows)]
        record = Record.of(self.step, "training, by epoch", rows)
        return replace(self.model, records=(*self.model.records, record))

    # where it was broken off

    def cancelled(self, stop: Cancelled) -> Cancelled:
        """The same, saying what is kept."""
        told = Cancelled(" ".join(filter(None, (str(stop), self._kept(), self._goes_on()))))
        told.best = self.best_model() if self.best >= 0 else None
        return told

    def _diverged(self, what: str, epoch: int) -> TrainingDiverged:
        again = self._goes_on(" and would diverge there again")
        advice = f"Give a learning_rate below {self.plan.learning_rate:g}."
        return TrainingDiverged(
            " ".join(filter(None, (f"{self.step}: {what} in epoch {epoch + 1}.", self._kept(), again, advice))),
            self.best_model() if self.best >= 0 else None,
        )

    def _kept(self) -> str:
        if self.best < 0:
            return f"No epoch of {self.step} was finished that can be kept."
        return f"The best epoch of {self.step} so far, {self.best + 1}, is kept in the error's `best`."

    def _goes_on(self, further: str = "") -> str:
        if self.checkpoint is NO_CHECKPOINT or not self.rows:
            return ""
        if self._ended():
            return "The same recipe goes on after this training."
        return f"The same recipe goes on from epoch {len(self.rows) + 1}{further}."

    def keep_in(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Save each epoch there, and go on from what is found there."""
        if checkpoint is NO_CHECKPOINT:
            return
        self.identity = self._identity()
        self.checkpoint = checkpoint.part(self.identity)
        data = self.checkpoint.load()
        if data is None:
            return
        kept = _snapshot.unpack(data)
        if kept is None or kept["of"] != self.identity:
            why = "damaged" if kept is None else "of another training"
            progress(0.0, f"what was saved of this training is {why}: it starts over")
            return
        self._restore(kept)
        progress(len(self.rows) / self.plan.epochs, f"goes on after epoch {len(self.rows)} of {self.plan.epochs}")

    def _identity(self) -> str:
        """SHA-256 of all that decides the result; to be asked for before the first update."""
        parts = [self.step, asdict(self.plan), self.seed, self.settled_from, self.task.fingerprint]
        # of a copy, since a fingerprint is remembered and this model's weights are about to change
        parts += [replace(self.model).fingerprint, [type(c).__name__ for c in self.constraints]]
        parts += [[(name, tuple(value.shape)) for name, value in self.trained.state_dict().items()]]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _state(self) -> dict[str, Any]:
        device = device_of(self.model)
        return {
            "of": self.identity,
            "trained": self.trained.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "samples": self.samples.state(),
            "constraints": [constraint.state() for constraint in self.constraints],
            "random": torch.random.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "rows": self.rows,
            "best": self.best,
            "best_state": self.best_state,
        }

    def _restore(self, kept: dict[str, Any]) -> None:
        self.trained.load_state_dict(kept["trained"])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.scaler.load_state_dict(kept["scaler"])
        self.samples.restore(kept["samples"])
        for constraint, state in zip(self.constraints, kept["constraints"], strict=True):
            constraint.restore(state)
        torch.random.set_rng_state(kept["random"])
        if kept["random_cuda"] is not None:
            torch.cuda.set_rng_state(kept["random_cuda"], device_of(self.model))
        self.rows, self.best, self.best_state = kept["rows"], kept["best"], kept["best_state"]


def device_of(model: Model) -> torch.device:
    """Where the module's parameters lie."""
    return next(model.module.parameters()).device
