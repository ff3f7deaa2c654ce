"""`Finetune`: a few epochs of training that recover what pruning cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from workbench.compression import _checks, _keeping, _training
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, Step
from workbench.data.task import Task
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model


@dataclass(frozen=True)
class Finetune(Step):
    """Train the network further on the task's training split, by cross-entropy under a cosine schedule.

    Weights that pruning set to zero stay zero, and values that clustering made shared stay shared. The module's first
    output is taken as ``(N, classes)`` logits; a network that ends in a softmax is recognised by its rows adding up to
    1. The preprocessed training split is held in memory. The weights of the best epoch are taken, and the record says
    what each one came to, the last included.

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
    patience
        Stop after so many epochs without a better one; 0 never stops early.
    validation
        Share of the training split that is held out to tell the best epoch by; 0 trains on all and keeps the last.
    mixed_precision
        Compute in bfloat16, or in float16 on a GPU without it, where torch holds that to be safe; the weights stay
        float32.

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
    optimizer: str = field(default="adam", metadata={"choices": _training.OPTIMISERS})
    weight_decay: float = 0.0
    patience: int = 0
    validation: float = 0.1
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        _checks.training("Finetune", self)

    @property
    def label(self) -> str:
        """``Finetune 2 epochs``."""
        return f"Finetune {self.epochs} epoch{'s' if self.epochs > 1 else ''}"

    def check(self, model: Model) -> None:
        """Refuse a model without a float32 torch module that takes batches of any size."""
        _checks.trainable("Finetune", model, "wb.Finetune()")
        _checks.any_batch("Finetune", model)

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The trained model; see `_training.train` for what it raises."""
        self.check(model)
        trained = model.changed("", module=_training.copied(model).module)
        return _training.train(
            trained,
            task,
            _training.Plan.of(self),
            step=self.label,
            constraints=_keeping.constraints(trained),
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
        )
