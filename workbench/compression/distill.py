"""`Distill`: a student learns to answer as its teacher does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from workbench.compression import _checks, _distillation, _keeping, _students, _training
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, Step
from workbench.compression._run import device_of
from workbench.compression._samples import Samples
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import structure
from workbench.models.model import Model
from workbench.models.record import Record
from workbench.models.zoo import ZOO

AS_IS = "as is"
EVERY_SECOND_BLOCK = "every second block"
_ON = ("logits", "features", "attention")


@dataclass(frozen=True)
class Distill(Step):
    """Train a student on what the untouched model, its teacher, answers.

    The teacher is the study's own model as it was before any step (`Model.origin`), frozen and in evaluation mode;
    student and teacher may be equal (self-distillation). A network trained by a step of the same recipe is therefore no
    teacher: load it as a model of its own first, ``wb.load(trained.module, …)``. Weights that pruning set to zero stay
    zero, shared values stay shared. The loss is ``(1 - weight) · cross-entropy with the labels + weight · T² ·
    KL(teacher ‖ student at temperature T)``, and for features and attention ``feature_weight`` times the distance of
    one layer of each besides.

    Parameters
    ----------
    student
        ``as is``: the model the steps before made, a pruned one for example. ``every second block``: the same with
        blocks 0, 2, 4 … of each stack of blocks, which start with the weights they have. A name of the zoo: that
        network with random weights; it takes the place of the whole model, so that no step may stand before.
    on
        ``logits``: outputs alone. ``features``: also the mean squared difference of an intermediate layer's output,
        through a 1 × 1 convolution or linear layer that is trained along where widths differ. ``attention``: also the
        squared distance of the maps of where a layer's output is large: over places of feature maps, over tokens.
    temperature
        Softens both distributions; above 0.
    weight
        Of the teacher's answers against the labels, 0 to 1. 0 is the labels alone: with ``logits`` the same student
        trained without a teacher, to compare with.
    feature_weight
        Of the distance of features or attention.
    teacher_layer, student_layer
        What is compared then, by name. By default the last feature map, or else the last tokens, or else (features) the
        last hidden vector that both have. Where sizes differ the larger is pooled to the smaller.
    epochs, learning_rate, batch_size, optimizer, weight_decay, patience, validation, mixed_precision
        As in `Finetune`.

    Raises
    ------
    StepError
        If a setting is out of range.

    Notes
    -----
    Hinton et al. 2015 (logits); Romero et al., ICLR 2015 (features, here added to the logits and not trained before
    them); Zagoruyko & Komodakis, ICLR 2017 (attention); every second block: Sanh et al., "DistilBERT", 2019, section 3.
    The teacher answers each training sample once, unless the task augments them.
    """

    family: ClassVar[str] = "distilled"

    student: str = field(default=AS_IS, metadata={"choices": (AS_IS, EVERY_SECOND_BLOCK, *ZOO)})
    on: str = field(default="logits", metadata={"choices": _ON})
    temperature: float = 4.0
    weight: float = field(default=0.9, metadata={"low": 0.0, "high": 1.0})
    feature_weight: float = 1.0
    teacher_layer: str = ""
    student_layer: str = ""
    epochs: int = 10
    learning_rate: float = 2e-3
    batch_size: int = 32
    optimizer: str = field(default="adam", metadata={"choices": _training.OPTIMISERS})
    weight_decay: float = 0.0
    patience: int = 0
    validation: float = 0.1
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        _checks.choice("Distill", "student", self.student, (AS_IS, EVERY_SECOND_BLOCK, *ZOO))
        _checks.choice("Distill", "on", self.on, _ON)
        _checks.number("Distill", "temperature", self.temperature, 0)
        _checks.number("Distill", "weight", self.weight, 0, 1, low_allowed=True, high_allowed=True)
        _checks.number("Distill", "feature_weight", self.feature_weight, 0)
        for setting in ("teacher_layer", "student_layer"):
            value = getattr(self, setting)
            if not isinstance(value, str) or (value and self.on == "logits"):
                raise StepError(
                    f"Distill: {setting} is {value!r}, but layers are compared with on='features' or on='attention' "
                    "alone; give one of them and the layer's name, or leave it empty."
                )
        _checks.training("Distill", self)

    @property
    def label(self) -> str:
        """``Distil into lenet5-quarter, 10 epochs``, and the settings that are not the default."""
        first = {AS_IS: "Distil", EVERY_SECOND_BLOCK: "Distil every second block"}
        words = [first.get(self.student, f"Distil into {self.student}")]
        if self.on != "logits":
            words.append(self.on)
        if not self.weight:
            words.append("labels alone" if self.on == "logits" else "no soft targets")
        elif self.weight != 0.9:
            words.append(f"weight {self.weight:g}")
        if self.weight and self.temperature != 4:
            words.append(f"T {self.temperature:g}")
        return ", ".join([*words, f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"])

    def check(self, model: Model) -> None:
        """Refuse a model that cannot be trained or has no teacher, and a student that does not fit its teacher."""
        _checks.trainable("Distill", model, f"wb.Distill({self.student!r})")
        _checks.any_batch("Distill", model)
        teacher = model.origin or model
        if teacher.module is None:
            raise StepError(
                f"Distill: the teacher, {teacher.name} as it was before any step, is an ONNX graph only. Load it as a "
                "module or a checkpoint with its architecture."
            )
        if self.student in ZOO and model.origin is not None:
            raise StepError(
                f"Distill: {self.student} starts anew and takes the place of the whole model, so that what the steps "
                f"before made of {model.name} would be thrown away. Leave them out, or give student='as is'."
            )
        student = self.preview(model)
        _students.check_outputs("Distill", teacher, student)
        self._counterparts(teacher, student)

    def preview(self, model: Model) -> Model:
        """The student before it is trained, so that later steps find its layers."""
        return self._student(model, seed=0)

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The trained student, with a record of each epoch and of how often it agrees with its teacher.

        Raises
        ------
        StepError
            If the first output of one of the two is not ``(N, classes)`` scores for the task's classes, and whatever
            `_training.train` raises.
        """
        self.check(model)
        # an inference tensor made by the caller cannot be trained; a teacher's last bits go with the number of threads
        with torch.inference_mode(False), _training.settled(seed, device_of(model)):
            teacher, student = _training.copied(model.origin or model), self._student(model, seed)
            pair = self._counterparts(teacher, student)
            theirs, its = (_distillation.Classifier.of("Distill", m, task) for m in (teacher, student))
            with _distillation.compared(teacher, student, pair, self.on, self.feature_weight, seed) as comparison:
                tap = None if comparison is None else comparison.teacher
                asked = bool(self.weight) or comparison is not None
                answers = _distillation.Teacher(theirs, task, tap, progress.part(0.0, 0.1)) if asked else None
                trained = _training.train(
                    student,
                    task,
                    _training.Plan.of(self),
                    step=self.label,
                    loss=_distillation.Distillation(its, answers, self.temperature, self.weight, comparison),
                    constraints=_keeping.constraints(student),
                    helpers=[comparison.project] if comparison is not None and comparison.project is not None else [],
                    seed=seed,
                    progress=progress.part(0.1, 1.0),
                    checkpoint=checkpoint,
                )
            record = Record.of(self.label, "agreement with the teacher", self._judged(its, theirs, task, seed))
        return replace(trained, records=(*trained.records, record))

    def _student(self, model: Model, seed: int) -> Model:
        """The student before training, with a module of its own."""
        with torch.inference_mode(False):
            if self.student == AS_IS:
                return model.changed(self.family, module=_training.copied(model).module)
            if self.student == EVERY_SECOND_BLOCK:
                module = _students.every_second_block("Distill", model)
            else:
                module = _students.of_the_zoo("Distill", self.student, model, seed)
        edit = structure.difference(model.module, module)
        return model.changed(self.family, module=module, edits=(*model.edits, edit))

    def _counterparts(self, teacher: Model, student: Model) -> tuple[_students.Stage, _students.Stage] | None:
        if self.on == "logits":
            return None
        names = self.teacher_layer, self.student_layer
        return _students.counterparts("Distill", teacher, student, names, maps=self.on == "attention")

    def _judged(
        self, student: _distillation.Classifier, teacher: _distillation.Classifier, task: Task, seed: int
    ) -> list[dict[str, Any]]:
        """Rows of the record: how the trained student compares with its teacher, on samples held out and not."""
        device, rows = device_of(student.model), []
        if self.validation:
            held_out = Samples(task, self.batch_size, self.validation, seed, self.label, device).validation()
            rows.append({"samples": "held out", **_distillation.agreement(student, teacher, held_out)})
        if task.count("calibration"):
            batches = _distillation.calibration(task, device)
            rows.append({"samples": "calibration", **_distillation.agreement(student, teacher, batches)})
        return rows
