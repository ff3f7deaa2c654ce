"""What distillation minimises: the distance of a student from its teacher, in outputs, features or attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workbench.compression._losses import Batch, are_probabilities, check_labels, logits
from workbench.compression._run import device_of
from workbench.compression._students import Stage
from workbench.data.task import Task
from workbench.jobs import Progress
from workbench.models import inputs as model_inputs
from workbench.models.model import Model

_BATCH = 256  # samples the teacher sees at a time
_REMEMBERED_BYTES = 256 * 2**20
_POOLS = {1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}
_POINTWISE: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def soft_target_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher at a temperature T, times T², in nats per sample.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2: the factor keeps the gradient's size
    the same whatever T is.

    Parameters
    ----------
    scores, targets
        ``(N, classes)`` logits of student and teacher.
    temperature
        Above 0.
    """
    student, teacher = (functional.log_softmax(x / temperature, 1) for x in (scores, targets))
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(features: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference of features ``(N, channels, …places)``, the larger ones pooled to the smaller's places.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3, as a mean over elements.
    """
    return functional.mse_loss(*_to_same_places(features, targets))


def attention_map(features: Tensor) -> Tensor:
    """Where a layer looks: the squares of ``(N, channels, …places)`` added up over channels, ``(N, 1, …places)``.

    Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1, with p = 2.
    """
    return features.square().sum(1, keepdim=True)


def attention_loss(features: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of the two attention maps, each of length 1, averaged over samples: 0 to 2.

    Zagoruyko & Komodakis 2017, equation 2, squared as in its authors' code. The larger map is pooled to the smaller.

    Parameters
    ----------
    features, targets
        ``(N, channels, …places)``; they may differ in all but N and the number of axes.
    """
    maps = _to_same_places(attention_map(features), attention_map(targets))
    student, teacher = (functional.normalize(x.flatten(1)) for x in maps)
    return (student - teacher).square().sum(1).mean()


def _to_same_places(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    places = tuple(map(min, first.shape[2:], second.shape[2:]))
    return tuple(x if x.shape[2:] == places else _POOLS[len(places)](x, places) for x in (first, second))


def projection(student: Stage, teacher: Stage, seed: int) -> nn.Module | None:
    """A 1 × 1 convolution or linear layer from the student's width to the teacher's; None where they are the same."""
    if student.channels == teacher.channels:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        if not student.places:
            return nn.Linear(student.channels, teacher.channels)
        return _POINTWISE[len(student.places)](student.channels, teacher.channels, 1)


class Tap:
    """The output of one layer in the latest call of a module, as ``(N, channels, …places)``."""

    def __init__(self, module: nn.Module, stage: Stage):
        self._layer, self._stage = module.get_submodule(stage.layer), stage
        self.value: Tensor | None = None

    def __enter__(self) -> Tap:
        self._hook = self._layer.register_forward_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self.value = None

    def _note(self, layer: nn.Module, given: Any, output: Any) -> None:
        self.value = self._stage.channels_first(model_inputs.outputs(output)[0]).float()


@dataclass(frozen=True)
class Classifier:
    """A model that gives scores of classes, as logits or as probabilities."""

    model: Model
    of_probabilities: bool

    @classmethod
    def of(cls, step: str, model: Model, task: Task) -> Classifier:
        """Try a model on the first training samples, once for all batches.

        Raises
        ------
        StepError
            If its first output is not ``(N, classes)`` logits, or has no column for a label of the task.
        """
        count = min(task.count("train"), _BATCH)
        labels = torch.from_numpy(task.labels("train"))
        model.module.eval()
        with torch.no_grad():
            output = model.run_module(*_tensors(task.inputs("train", count), device_of(model)))
        scores = logits(step, output, labels[:count])
        check_labels(scores, labels)
        return cls(model, are_probabilities(scores))

    def scores(self, output: Any) -> Tensor:
        """What the model gave as ``(N, classes)`` logits; those of a softmax up to a constant per sample."""
        scores = model_inputs.outputs(output)[0].float()
        return scores.clamp_min(1e-12).log() if self.of_probabilities else scores


class Teacher:
    """A frozen model in evaluation mode, whose answers to the training samples are computed once.

    Parameters
    ----------
    classifier
        The model; it must be the caller's own.
    task
        Under augmentation a sample is another one each time, and the teacher runs on every batch. So it does where its
        answers would take more than 256 MiB.
    tap
        Of the layer whose features are wanted; None for scores alone.
    progress
        Told while the answers are computed.
    """

    def __init__(self, classifier: Classifier, task: Task, tap: Tap | None, progress: Progress):
        self._classifier, self._tap = classifier, tap
        self._answers = None if task.augment else self._all(task, progress)

    def answers(self, batch: Batch) -> list[Tensor]:
        """Scores of a batch, and features where they are wanted."""
        if self._answers is None:
            return self._run(batch.inputs)
        return [answer[batch.indices.to(answer.device)] for answer in self._answers]

    def _all(self, task: Task, progress: Progress) -> list[Tensor] | None:
        found: list[list[Tensor]] = []
        count, device = task.count("train"), device_of(self._classifier.model)
        for inputs, _ in task.batches("train", _BATCH):
            progress(min(len(found) * _BATCH / count, 1.0), f"teacher, {len(found) * _BATCH} of {count} samples")
            found.append(self._run(_tensors(inputs, device)))
            if sum(answer.nbytes for answer in found[0]) / len(found[0][0]) * count > _REMEMBERED_BYTES:
                return None
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            scores = self._classifier.scores(self._classifier.model.run_module(*inputs))
        return [scores] if self._tap is None else [scores, self._tap.value]


@dataclass(frozen=True, eq=False)
class Comparison:
    """One layer of each network, how far apart their outputs are, and how much that counts.

    Attributes
    ----------
    teacher, student
        Taps of the two layers.
    project
        From the student's width to the teacher's, trained along; None where no such thing is needed.
    distance
        Of two tensors ``(N, channels, …places)``.
    weight
        Factor of the distance in the loss.
    """

    teacher: Tap
    student: Tap
    project: nn.Module | None
    distance: Callable[[Tensor, Tensor], Tensor]
    weight: float

    def loss(self, target: Tensor) -> Tensor:
        """Of what the student's layer just gave, against what the teacher's layer gave for the same samples."""
        features = self.student.value if self.project is None else self.project(self.student.value)
        return self.weight * self.distance(features.float(), target)


@contextmanager
def compared(
    teacher: Model, student: Model, pair: tuple[Stage, Stage] | None, on: str, weight: float, seed: int
) -> Iterator[Comparison | None]:
    """Listen to a layer of each network for a while; None where `pair` is.

    Parameters
    ----------
    pair
        The stage of the teacher and that of the student.
    on
        ``features`` or ``attention``; only features need a projection.
    weight
        Of the distance.
    seed
        Of the projection's first weights.
    """
    if pair is None:
        yield None
        return
    features = on == "features"
    project = projection(pair[1], pair[0], seed) if features else None
    if project is not None:
        project = project.to(device_of(student))
    with Tap(teacher.module, pair[0]) as theirs, Tap(student.module, pair[1]) as its:
        yield Comparison(theirs, its, project, feature_loss if features else attention_loss, weight)


class Distillation:
    """The loss of a student: labels, the teacher's soft targets, and features or attention.

    ``(1 - weight) · cross-entropy + weight · T² · KL + feature_weight · distance``; without a teacher the first alone.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Teacher | None,
        temperature: float,
        weight: float,
        comparison: Comparison | None,
    ):
        self._student, self._teacher, self._comparison = student, teacher, comparison
        self._temperature, self._weight = temperature, weight

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        scores = self._student.scores(output)
        loss = (1 - self._weight) * functional.cross_entropy(scores, batch.labels)
        if self._teacher is None:
            return loss
        targets, *features = self._teacher.answers(batch)
        if self._weight:
            loss = loss + self._weight * soft_target_loss(scores, targets, self._temperature)
        return loss if self._comparison is None else loss + self._comparison.loss(*features)


def _tensors(arrays: Iterable[Any], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


def calibration(task: Task, device: torch.device) -> Iterator[Batch]:
    """The task's calibration samples."""
    seen = 0
    for inputs, labels in task.batches("calibration", _BATCH):
        indices = torch.arange(seen, seen + len(labels))
        seen += len(labels)
        yield Batch(_tensors(inputs, device), torch.from_numpy(labels).to(device), indices)


def agreement(student: Classifier, teacher: Classifier, batches: Iterable[Batch]) -> dict[str, Any]:
    """How often the two choose the same class, and the right one.

    Returns
    -------
    dict
        count; agreement, teacher_accuracy, student_accuracy (0 to 1).
    """
    count = same = 0
    right = {"teacher": 0, "student": 0}
    with torch.no_grad():
        for batch in batches:
            chosen = {
                name: model_inputs.outputs(one.model.run_module(*batch.inputs))[0].argmax(1)
                for name, one in (("teacher", teacher), ("student", student))
            }
            count += len(batch.labels)
            same += int((chosen["teacher"] == chosen["student"]).sum())
            for name, classes in chosen.items():
                right[name] += int((classes == batch.labels).sum())
    return {
        "count": count,
        "agreement": same / count,
        "teacher_accuracy": right["teacher"] / count,
        "student_accuracy": right["student"] / count,
    }
