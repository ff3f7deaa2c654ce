"""`Prune`: take away what matters least, whole channels, attention heads, kernels or single weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from workbench.compression import _checks, _importance, _keeping, _training, _widths
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, PerLayer, Step
from workbench.compression._channels import Channels
from workbench.compression._heads import Heads, attentions
from workbench.compression._ranking import Rule
from workbench.compression._rounds import cubic, epochs_of_rounds
from workbench.compression._unstructured import PATTERNS, Gradual, Masks, Units, apply_masks, rounds_that_fit
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.models.record import Record

_SCOPES = ("layer", "global", "isomorphic")
_IMPORTANCE = {
    "channel": _importance.IMPORTANCE,
    "head": ("l2", "l1", "random", "taylor"),
    "kernel": ("l2", "l1", "random", "lamp", "taylor"),
    "weight": ("l2", "l1", "random", "lamp", "taylor"),
    **dict.fromkeys(PATTERNS, ("l2", "l1", "random", "taylor")),
}
_WORDS = {"channel": "", "head": " of heads", "kernel": " of kernels", "weight": " of weights"}
_NARROWING = {"channel": Channels, "head": Heads}


@dataclass(frozen=True)
class Prune(Step):
    """Remove the least important channels or heads, so that the network becomes smaller and faster; or zero weights.

    Weights that are zero already stay zero and count as the smallest. How much goes is said by one of `ratio`,
    `threshold` and `layers`, or by `ratio` with exceptions in `layers`; a pattern such as ``2:4`` says it itself.

    Parameters
    ----------
    ratio
        ``channel``: the share of its output channels that each prunable layer loses. Layers joined by an addition lose
        the same channels, as one. The layers that produce the output keep their width, and so do those that cannot be
        narrowed without changing what the rest computes: the residual stream of a ResNet with zero-padded shortcuts. A
        convolution between two narrowed layers loses ``ratio`` of its inputs as well, so parameters and MACs fall by
        more than the ratio. ``head``: the share of each attention's heads. ``kernel``, ``weight``: the share that
        becomes zero, biases apart. 0 where it is not given.
    granularity
        ``channel``: output channels of convolutions, neurons of linear layers. ``head``: heads of
        `torch.nn.MultiheadAttention` and of modules with a number of heads and query, key and value as linear layers.
        Both make the network smaller. ``kernel``: two-dimensional kernels of convolutions; ``weight``: single weights;
        ``2:4`` and the like: all but the 2 largest of every 4 weights along the input axis, layers whose inputs are no
        multiple of 4 being left as they are. These set weights to zero: it saves bytes once the file is compressed,
        and no time on any engine here.
    importance
        ``l2``, ``l1``: the norm, of a channel over the layers it runs through. ``random``. ``taylor``: magnitude of
        weight times gradient on the calibration samples. For kernels, weights and channels also ``lamp``, which makes
        scores of unlike layers comparable. For channels also ``bn``, the scale of the batch norm that follows, and
        ``fpgm``, the distance to the layer's other filters.
    scope
        ``layer``: every layer gives up the same share. ``global``: the least important of the whole network go first,
        so that layers lose unlike shares. ``isomorphic``, of channels: the same among groups of layers of the same
        shape of sub-graph. Where channels or heads are ranked across layers, each keeps at least a tenth of its own.
    round_to
        Of channels: widths become the nearest multiple of this, at least one and ties to the wider; a layer narrower
        than two multiples gets the exact width. The default is measured on int8 ResNet-20, batch 1, 2 threads, ONNX
        Runtime: 0.35 ms unpruned; pruned by 30 % it took 0.47 ms without rounding, 0.37 in multiples of 4, 0.36 of 8,
        0.41 of 16; by 60 %, 0.41 ms without rounding and 0.32 in multiples of 8. OpenVINO was indifferent (0.33 to 0.34
        ms). 0 times the layers that cost most on ONNX Runtime here, in float32, and takes the one of 1, 4, 8 and 16
        that is fastest per channel; its result then depends on the machine as well. Others have no use for it.
    threshold
        Instead of a ratio. ``weight``: every weight of smaller magnitude becomes zero; ``kernel``: every kernel of
        smaller norm. ``channel``, ``head``: those of smaller importance go, in units of the mean of their layer
        (``lamp`` has a unit of its own); at least a tenth stays. `scope` plays no part.
    layers
        A ratio by layer (by attention, of heads), instead of `ratio` there; 0 leaves a layer whole. Without a `ratio`
        all other layers stay whole.
    rounds
        Parts in which it is done, with training between: after k of n the sparsity is ``1 - (1 - k / n)³`` of the
        final one.
    epochs
        Passes over the training split; 0 does not train. Channels and heads: an equal part of them after each round.
        Others: masks are made anew in each round, over the first two thirds of the training, and stay zero between;
        the best epoch is one of those from there on.
    learning_rate, batch_size, weight_decay, validation
        Of the training, as in `Finetune`.

    Raises
    ------
    StepError
        If a setting is out of range, or does not go with another.

    Notes
    -----
    Channels: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, over the dependency groups of Fang et al.,
    CVPR 2023; ``isomorphic``: Fang et al., ECCV 2024. Weights: Han et al., "Learning both Weights and Connections",
    NeurIPS 2015; while training: Zhu & Gupta, "To prune, or not to prune", 2017. ``2:4``: Mishra et al.,
    "Accelerating Sparse Deep Neural Networks", 2021.
    """

    family: ClassVar[str] = "pruned"

    ratio: float = field(default=0.0, metadata={"low": 0.0, "high": 1.0, "start": 0.5})
    granularity: str = field(default="channel", metadata={"choices": tuple(_IMPORTANCE)})
    importance: str = field(default="l2", metadata={"choices": _importance.IMPORTANCE})
    scope: str = field(default="layer", metadata={"choices": _SCOPES})
    round_to: int = 8
    threshold: float = 0.0
    layers: PerLayer = field(default=PerLayer(), metadata={"each": "ratio"})
    rounds: int = 1
    epochs: int = 0
    learning_rate: float = 2e-3
    batch_size: int = 32
    weight_decay: float = 0.0
    validation: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", PerLayer(self.layers))
        _checks.choice("Prune", "granularity", self.granularity, _IMPORTANCE)
        _checks.choice("Prune", "importance", self.importance, _importance.IMPORTANCE)
        _checks.choice("Prune", "scope", self.scope, _SCOPES)
        self._check_amount()
        self._check_combination()
        _checks.whole("Prune", "round_to", self.round_to, least=0)
        if self.threshold and not self.round_to:
            raise StepError(
                "Prune: round_to 0 times the widths that a ratio leads to; with a threshold, give round_to."
            )
        _checks.whole("Prune", "rounds", self.rounds)
        _checks.whole("Prune", "epochs", self.epochs, least=0)
        _checks.number("Prune", "learning_rate", self.learning_rate, 0)
        _checks.whole("Prune", "batch_size", self.batch_size)
        _checks.number("Prune", "weight_decay", self.weight_decay, 0, low_allowed=True)
        _checks.number("Prune", "validation", self.validation, 0, 1, low_allowed=True)
        self._check_rounds()

    def _check_amount(self) -> None:
        if self.granularity in PATTERNS:
            if self.ratio or self.threshold or self.layers:
                raise StepError(
                    f"Prune: {self.granularity} says itself how much goes; leave out ratio, threshold and layers."
                )
            return
        if self.threshold and (self.ratio or self.layers):
            raise StepError("Prune: give a ratio (with exceptions in layers) or a threshold, not both.")
        if self.threshold:
            _checks.number("Prune", "threshold", self.threshold, 0)
        elif self.ratio or isinstance(self.ratio, bool) or not self.layers:
            _checks.number("Prune", "ratio", self.ratio, 0, 1)
        for layer, ratio in self.layers.items():
            _checks.number("Prune", f"the ratio of {layer}", ratio, 0, 1, low_allowed=True)
        if self.layers and not self.ratio and not any(self.layers.values()):
            raise StepError("Prune: every ratio in layers is 0, so that nothing is asked for. Give one above 0.")

    def _check_combination(self) -> None:
        accepted = _IMPORTANCE[self.granularity]
        if self.importance not in accepted:
            raise StepError(
                f"Prune: importance {self.importance!r} does not go with granularity {self.granularity!r}; accepted "
                f"there: {', '.join(accepted)}."
            )
        measured = accepted if self.granularity in _NARROWING else ("l2", "l1")
        if self.threshold and (self.importance not in measured or self.importance == "random"):
            raise StepError(
                f"Prune: a threshold has no meaning for importance {self.importance!r}; give a ratio, or importance "
                f"{' or '.join(repr(name) for name in measured if name != 'random')}."
            )
        if self.scope == "isomorphic" and self.granularity != "channel":
            raise StepError(
                f"Prune: scope 'isomorphic' ranks groups of channels, not granularity {self.granularity!r}; give "
                "'layer' or 'global'."
            )

    def _check_rounds(self) -> None:
        if self.rounds > 1 and not self.epochs:
            raise StepError(
                f"Prune: rounds is {self.rounds} with no training between them, which comes to the same as one. Give "
                "epochs, or leave rounds at 1."
            )
        if self.granularity in _NARROWING and self.epochs and self.rounds > self.epochs:
            raise StepError(
                f"Prune: {self.rounds} rounds of {self.granularity}s need at least as many epochs, and epochs is "
                f"{self.epochs}. Give more epochs or fewer rounds."
            )

    @property
    def label(self) -> str:
        """``Prune 50 %``, ``Prune 50 % of weights``, ``Prune 2:4``, and the settings that are not the default."""
        return ", ".join([f"Prune {self._amount()}", *self._settings()])

    def _amount(self) -> str:
        if self.granularity in PATTERNS:
            return self.granularity
        of = _WORDS[self.granularity]
        if self.threshold:
            return f"{of.removeprefix(' of ') or 'channels'} below {self.threshold:g}"
        if self.ratio:
            return f"{100 * self.ratio:g} %{of}"
        return f"{of.removeprefix(' of ') or 'channels'} of {len(self.layers)} layer{'s' * (len(self.layers) > 1)}"

    def _settings(self) -> Iterable[str]:
        if self.ratio and self.layers:
            yield f"{len(self.layers)} layer{'s' * (len(self.layers) > 1)} otherwise"
        if self.scope != "layer":
            yield self.scope
        # of single weights both norms are the magnitude
        if self.importance != "l2" and (self.importance != "l1" or self.granularity in (*_NARROWING, "kernel")):
            yield {"random": "random", "taylor": "Taylor"}.get(self.importance, self.importance.upper())
        if self.granularity == "channel" and self.round_to != 8:
            yield f"multiples of {self.round_to}" if self.round_to else "measured multiples"
        if self.rounds > 1:
            yield f"{self.rounds} rounds"
        if self.epochs:
            yield f"{self.epochs} epoch{'s' * (self.epochs > 1)}"

    def check(self, model: Model) -> None:
        """Refuse a model without a float32 torch module that has what is to be pruned, and layers it does not have."""
        _checks.trainable("Prune", model, self.to_python())
        if self.epochs:
            _checks.any_batch("Prune", model)
        if self.granularity == "head":
            known: Iterable[str] = attentions(model.module)
            if not known:
                raise StepError(
                    f"Prune: {model.name} has no attention whose heads can be told: torch.nn.MultiheadAttention, or a "
                    "module with a num_heads and linear layers. Give another granularity."
                )
        else:
            _checks.has_weighted_layers("Prune", model)
            kinds = nn.modules.conv._ConvNd if self.granularity == "kernel" else _checks.WEIGHTED
            known = [name for name, layer in model.module.named_modules() if isinstance(layer, kinds)]
            if not known:
                raise StepError(f'Prune: {model.name} has no convolution; give granularity="weight".')
        _checks.layers("Prune", self.layers, known)

    def preview(self, model: Model) -> Model:
        """What `apply` gives with the old weights; one of each layer that will have zeros is zero, for steps to see."""
        if self.granularity in _NARROWING:
            return super().preview(model)
        copied = _training.copied(model)
        for weight in Units(self.granularity).weights(copied.module).values():
            weight.data[(0,) * weight.dim()] = 0
        return model.changed(self.family, module=copied.module)

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The pruned model; raises `StepError` where nothing can be removed without changing what the rest computes."""
        self.check(model)
        progress(0.0, "ranking")
        rule = Rule(self.ratio, self.threshold, self.importance, self.scope, self.round_to, dict(self.layers))
        if self.granularity in _NARROWING:
            result = self._narrowed(model, task, rule, seed, progress, checkpoint)
        else:
            result = self._zeroed(model, task, rule, seed, progress, checkpoint)
        progress(1.0)
        return result

    def _narrowed(
        self, model: Model, task: Task, rule: Rule, seed: int, progress: Progress, checkpoint: Checkpoint
    ) -> Model:
        records: list[Record] = []
        if self.granularity == "channel" and not self.round_to:
            multiple, rows = _widths.fastest_multiple(model, rule, progress=progress.part(0.0, 0.5, "widths"))
            progress = progress.part(0.5, 1.0)
            rule, records = replace(rule, round_to=multiple), [Record.of(self.label, "widths, timed here", rows)]
        narrowing = _NARROWING[self.granularity](model, rule, task, seed)
        if self.epochs:
            narrowing.cut(model)  # what cannot be pruned is refused before any training
        current = model
        for number, epochs in enumerate(epochs_of_rounds(self.epochs, self.rounds)):
            part = progress.part(number / self.rounds, (number + 1) / self.rounds)
            cutting = part.part(0.0, 0.1) if epochs else part
            current = narrowing.cut(current, cubic((number + 1) / self.rounds), cutting)
            if epochs:
                current = _training.train(
                    current,
                    task,
                    _training.Plan.of(self, epochs=epochs),
                    step=f"{self.label}, round {number + 1}" if self.rounds > 1 else self.label,
                    constraints=_keeping.constraints(current),
                    seed=seed,
                    progress=part.part(0.1, 1.0),
                    checkpoint=checkpoint.part(f"round {number + 1}"),
                )
        records.append(Record.of(self.label, f"{self.granularity}s by layer", narrowing.rows(current)))
        records.append(Record.of(self.label, "size", _sizes(model, current)))
        return current.changed("pruned", module=current.module, records=(*current.records, *records))

    def _zeroed(
        self, model: Model, task: Task, rule: Rule, seed: int, progress: Progress, checkpoint: Checkpoint
    ) -> Model:
        copied = _training.copied(model)
        result = model.changed("pruned", module=copied.module, edits=(*model.edits, {}))
        masks = Masks(copied.module, Units(self.granularity), rule, seed, lambda: _importance.gradients(result, task))
        if not masks.weights:
            raise StepError(
                f"Prune: no layer of {model.name} has inputs in a multiple of {self.granularity.partition(':')[2]}, "
                f"which {self.granularity} needs ({', '.join(masks.left[:3])}, …). Zero single weights instead: "
                'wb.Prune(0.5, granularity="weight").'
            )
        before = masks.counts()
        if self.epochs:
            result = self._trained(result, task, masks, seed, progress, checkpoint)
        else:
            apply_masks(masks.weights, masks.make())
        record = Record.of(self.label, f"{self.granularity} pruning by layer", masks.rows(before))
        return replace(result, records=(*result.records, record))

    def _trained(
        self,
        model: Model,
        task: Task,
        masks: Masks,
        seed: int,
        progress: Progress,
        checkpoint: Checkpoint,
    ) -> Model:
        plan = _training.Plan.of(self)
        most = rounds_that_fit(self.epochs, task.count("train"), plan.validation, self.batch_size)
        if self.rounds > most:
            raise StepError(
                f"Prune: {self.rounds} rounds do not fit into two thirds of a training this short; at most {most} do. "
                "Give fewer rounds or more epochs."
            )
        gradual = Gradual(masks, self.rounds, lambda: _keeping.constraints(model))
        return _training.train(
            model,
            task,
            plan,
            step=self.label,
            constraints=[gradual],
            settled_from=gradual.settled_from,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
        )


def _sizes(before: Model, after: Model) -> list[dict[str, Any]]:
    """Parameters and multiply-accumulates of one sample."""
    return [
        {"quantity": name, "before": getattr(before, name), "after": getattr(after, name)}
        for name in ("parameters", "macs")
    ]
