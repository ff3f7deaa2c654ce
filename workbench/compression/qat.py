"""`QAT`: training with the rounding of int8 in place, so that the weights learn to live with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx

from workbench.compression import _checks, _folding, _keeping, _onnx_graph, _qat, _qat_places, _training
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, Step
from workbench.compression._calibrated import Judge, Samples, samples
from workbench.data.metric import Metric
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.models.record import Record

_NAME = "QAT"
_BITS = (2, 8)


@dataclass(frozen=True)
class QAT(Step):
    """Train the network while it rounds as int8 will, and leave it as the int8 graph that computes the same.

    Batch norms are folded first. Weights are rounded symmetrically per output channel, by their largest magnitude at
    each update. Activations are rounded to u8, per tensor, where int8 kernels want them: at the input of every
    convolution and linear layer and behind every convolution; in a network with layer normalisation or attention at the
    input of linear layers alone. Their ranges are the least and greatest values seen on the calibration split, move
    with the batches during the first half of the training, and then stay. What goes from one function to another
    between modules stays float32: an addition of two functions' results, say.

    Parameters
    ----------
    epochs
        Passes over the training split.
    learning_rate
        At the start; it falls to zero along half a cosine. Much smaller than in training from scratch, since the
        weights are nearly right.
    batch_size, optimizer, weight_decay, patience, validation
        As of `Finetune`.
    bits
        Of the weights, from 2 to 8. Below 8 they take fewer values of the same int8 graph, which compresses better and
        runs no faster.

    Raises
    ------
    StepError
        If a setting is out of range.

    Notes
    -----
    The record compares int8 before and after the training, on the calibration samples, which were trained on. Each
    signal-to-noise ratio is against float32 with the same weights: it is what rounding costs, not what training moved.
    After Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    CVPR 2018, section 3.
    """

    family: ClassVar[str] = "quantised"

    epochs: int = 2
    learning_rate: float = 1e-4
    batch_size: int = 32
    optimizer: str = field(default="adam", metadata={"choices": _training.OPTIMISERS})
    weight_decay: float = 0.0
    patience: int = 0
    validation: float = 0.1
    bits: int = field(default=8, metadata={"low": _BITS[0], "high": _BITS[1]})

    def __post_init__(self) -> None:
        _checks.training(_NAME, _training.Plan.of(self))
        _checks.whole(_NAME, "bits", self.bits, least=_BITS[0])
        if self.bits > _BITS[1]:
            raise StepError(f"{_NAME}: bits is {self.bits}; the int8 graph holds weights of {_BITS[0]} to {_BITS[1]}.")

    @property
    def label(self) -> str:
        """``QAT int8 2 epochs``, ``QAT int8 1 epoch, 4-bit weights``."""
        words = f"QAT int8 {self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        return words + (f", {self.bits}-bit weights" if self.bits < _BITS[1] else "")

    def check(self, model: Model) -> None:
        """Refuse a model without a float32 torch module that has convolutions or linear layers."""
        _checks.trainable(_NAME, model)
        _checks.has_weighted_layers(_NAME, model)
        _checks.any_batch(_NAME, model)

    def preview(self, model: Model) -> Model:
        """The kind and precision that `apply` gives; its graph is empty."""
        return model.changed(self.family, graph=onnx.ModelProto(), module=None, precision="int8")

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The trained network as an int8 graph, with records of the training and of what it gained.

        Raises
        ------
        StepError
            If no layer can be rounded; as `_training.train`.
        DataError
            If there are no calibration samples, or what comes out on them is NaN or infinite.
        LoadError
            If the network cannot be exported to ONNX.
        """
        self.check(model)
        held = samples(model, task)
        progress(0.0, "exporting")
        original = model.onnx()
        folded = _folding.folded(model)
        where = _qat_places.places(folded, products_only=_onnx_graph.is_transformer(original))
        start = _qat.aware(folded, where, self.bits, held, progress=progress.part(0.05, 0.1))
        rows = [_row("before training", folded, start, held, task.metric)]
        trained = _training.train(
            start,
            task,
            _training.Plan.of(self),
            step=self.label,
            constraints=[_qat.FollowRanges(start.module), *_keeping.constraints(start)],
            seed=seed,
            progress=progress.part(0.1, 0.9),
            checkpoint=checkpoint,
        )
        progress(0.9, "exporting")
        rows.append(_row("after training", _qat.unrounded(trained, folded), trained, held, task.metric))
        record = Record.of(self.label, "int8 on calibration samples", rows)
        graph = _qat.to_graph(trained, where, original)
        progress(1.0)
        return model.changed(
            self.family, graph=graph, module=None, precision="int8", records=(*trained.records, record)
        )


def _row(weights: str, reference: Model, rounded: Model, held: Samples, metric: Metric) -> dict[str, Any]:
    judge = Judge(reference, held, metric)
    score = judge.score(rounded)
    return {
        "weights": weights,
        "float32_accuracy": judge.reference_accuracy,
        "int8_accuracy": score.accuracy,
        "sqnr_db": score.sqnr_db,
    }
