"""`Cluster`: weights that share a few values, so that an index into a codebook stands for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from workbench.compression import _checks, _keeping, _training
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, PerLayer, Step
from workbench.compression._kmeans import kmeans_1d
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import structure
from workbench.models.model import Model
from workbench.models.record import Record
from workbench.profiling import sqnr_db

_SCOPES = ("layer", "global")
_FEWEST, _MOST = 2, 2**16


@dataclass(frozen=True)
class Cluster(Step):
    """Replace each weight by the nearest of a few shared values, found by k-means.

    The weights of convolutions and linear layers are shared; biases, normalisation and embeddings are left. Zeros stay
    zero and take none of the values. It saves bytes once the weights are coded (`workbench.compression.coding`), and no
    time on any engine here: they all compute with the plain values.

    Parameters
    ----------
    clusters
        Shared values besides zero, from 2 to 65536: 16 need an index of 4 bits.
    scope
        ``layer``: values of its own for each layer. ``global``: one set for the whole network.
    epochs
        Passes over the training split that fine-tune the shared values, by the summed gradient of the weights at each,
        and biases and normalisation along with them; 0 leaves the means that k-means found.
    learning_rate, batch_size, optimizer, patience, validation
        Of the fine-tuning, as of `Finetune`. ``sgd`` moves a shared value by the sum of many gradients and wants a
        learning rate smaller by as much; ``adam`` does not.
    layers
        Clusters by layer, for scope ``layer``; in either scope 0 leaves the layer as it is. All others take `clusters`.

    Raises
    ------
    StepError
        If a setting is out of range.

    Notes
    -----
    Han, Mao & Dally, "Deep Compression", ICLR 2016, section 3. Its record has a row for each layer: clusters (those in
    use), weights, nonzero, sqnr_db (of the shared weights against those before, without fine-tuning; None where none
    changed) and entropy_bits_per_weight (of the index, zero being one: what no code for single weights goes below).
    """

    family: ClassVar[str] = "clustered"

    clusters: int = field(default=16, metadata={"low": _FEWEST, "high": _MOST})
    scope: str = field(default="layer", metadata={"choices": _SCOPES})
    epochs: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 32
    optimizer: str = field(default="adam", metadata={"choices": _training.OPTIMISERS})
    patience: int = 0
    validation: float = 0.1
    layers: PerLayer = field(default=PerLayer(), metadata={"each": "clusters"})

    def __post_init__(self) -> None:
        _check_clusters("clusters", self.clusters)
        _checks.choice("Cluster", "scope", self.scope, _SCOPES)
        _checks.whole("Cluster", "epochs", self.epochs, least=0)
        _checks.training("Cluster", _training.Plan.of(self, epochs=max(self.epochs, 1)))
        object.__setattr__(self, "layers", PerLayer(self.layers))
        for layer, clusters in self.layers.items():
            if type(clusters) is int and clusters == 0:
                continue
            _check_clusters(f"clusters of {layer}", clusters)
            if self.scope == "global":
                raise StepError(
                    f"Cluster: {clusters} clusters of {layer} and scope 'global' exclude each other, since all layers "
                    "then share one set of values. Use scope='layer', or 0 to leave the layer as it is."
                )

    @property
    def label(self) -> str:
        """``Share 16 values``, and the settings that are not the default."""
        words = [f"Share {self.clusters} values"]
        if self.scope != "layer":
            words.append(self.scope)
        if self.layers:
            words.append(f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''} otherwise")
        if self.epochs:
            words.append(f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}")
        return ", ".join(words)

    def check(self, model: Model) -> None:
        """Refuse a model without float32 convolutions or linear layers in a torch module, and names of none of them."""
        _checks.trainable("Cluster", model, f"wb.Cluster({self.clusters})")
        _checks.has_weighted_layers("Cluster", model)
        names = [name for name, part in model.module.named_modules() if isinstance(part, _checks.WEIGHTED)]
        _checks.layers("Cluster", self.layers, names, "layers whose weights it can share")
        if all(self.layers.get(name) == 0 for name in names):
            raise StepError("Cluster: layers leaves every layer as it is (0), so that nothing is shared. Name fewer.")
        if self.epochs:
            _checks.any_batch("Cluster", model)

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The model with shared weights; see `_training.train` for what its fine-tuning raises."""
        self.check(model)
        changed = _training.copied(model).module
        rows = self._share(changed, progress.part(0.0, 0.2 if self.epochs else 1.0))
        edits = (*model.edits, structure.difference(model.module, changed))
        records = (*model.records, Record.of(self.label, "shared values, by layer", rows))
        result = model.changed("clustered", module=changed, edits=edits, records=records)
        if not self.epochs:
            return result
        return _training.train(
            result,
            task,
            _training.Plan.of(self),
            step=self.label,
            constraints=_keeping.constraints(result),
            seed=seed,
            progress=progress.part(0.2, 1.0),
            checkpoint=checkpoint,
        )

    def _share(self, module: nn.Module, progress: Progress) -> list[dict[str, Any]]:
        """Share the weights of `module`, in place; a row for each layer."""
        weights = self._weights(module)
        together = [list(weights)] if self.scope == "global" else [[name] for name in weights]
        rows = []
        for done, names in enumerate(together):
            progress(done / len(together), names[0])
            before = {name: weights[name].detach().cpu().numpy().copy() for name in names}
            after = _shared(before, self.layers.get(names[0], self.clusters))
            for name in names:
                with torch.no_grad():
                    weights[name].copy_(torch.from_numpy(after[name]))
                rows.append(_row(name, before[name], after[name]))
        progress(1.0)
        return rows

    def _weights(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Those to be shared, by layer; one that two layers have in common is the first one's."""
        weights: dict[nn.Parameter, str] = {}
        for name, part in module.named_modules():
            if isinstance(part, _checks.WEIGHTED) and self.layers.get(name) != 0:
                weights.setdefault(part.weight, name)
        return {name: weight for weight, name in weights.items()}


def _check_clusters(setting: str, value: Any) -> None:
    _checks.whole("Cluster", setting, value, least=_FEWEST)
    if value > _MOST:
        raise StepError(f"Cluster: {setting} is {value}; at most {_MOST} are possible, an index of 16 bits.")


def _shared(weights: Mapping[str, np.ndarray], clusters: int) -> dict[str, np.ndarray]:
    """The weights with each but the zeros replaced by the nearest of the values k-means finds for all of them."""
    held = {name: values != 0 for name, values in weights.items()}
    together = np.concatenate([values[held[name]] for name, values in weights.items()])
    after = {name: np.zeros_like(values) for name, values in weights.items()}
    if not len(together):
        return after
    centroids, indices = kmeans_1d(together, clusters)
    shared, start = centroids[indices], 0
    for name, values in after.items():
        stop = start + int(held[name].sum())
        values[held[name]] = shared[start:stop]
        start = stop
    return after


def _row(layer: str, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    values, counts = np.unique(after, return_counts=True)
    share = counts / counts.sum()
    return {
        "layer": layer,
        "clusters": int((values != 0).sum()),
        "weights": after.size,
        "nonzero": int((after != 0).sum()),
        "sqnr_db": None if np.array_equal(before, after) else sqnr_db(before, after),
        "entropy_bits_per_weight": abs(float((share * np.log2(share)).sum())),
    }
