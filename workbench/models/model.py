"""`Model`: a network, its example inputs, its named layers; a torch module, an ONNX graph, or both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any

import onnx
import pandas as pd
import torch
from torch import fx, nn

from workbench.errors import LoadError
from workbench.models import export, layers
from workbench.models.record import Record


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one input or output.

    `shape` holds None for every axis whose length may change; the batch axis comes first and is None unless the network
    fixes it. `dtype` is numpy's name.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        axes = ", ".join(("?" if i else "N") if n is None else str(n) for i, n in enumerate(self.shape))
        return f"{self.name}: {self.dtype} ({axes})"


@dataclass(frozen=True, eq=False)
class Model:
    """A network as a value: nothing in the workbench changes one in place; steps return new ones.

    Parameters
    ----------
    name
        What a person calls it, e.g. ``resnet20``.
    example
        Example inputs by name, in the order of the call, batch axis first. Two samples are enough.
    module
        The torch module, in evaluation mode; None for a model that is only a graph.
    graph
        The ONNX graph; None for a model that is still only a module (`onnx()` then exports it).
    keywords
        Whether the module takes its inputs by keyword instead of by position.
    source
        Where it came from, in words: ``zoo``, a file name, ``module``.
    weights
        What its weights are, in words: ``digits``, ``checkpoint``, ``random (seed 0)``.
    precision
        What the arithmetic is meant to be: ``fp32``, ``fp16``, ``bf16``, ``int8``.
    changes
        The techniques applied so far, in order: ``("pruned", "quantised")``.
    edits
        What turns the untouched module's structure into this one's, as JSON values; see `models.structure`.
    notes
        What loading it had to say, in sentences.
    records
        What the steps measured while they worked, in order: losses by epoch, gains of a correction.
    origin
        The untouched model this one was made from by steps; None for the untouched one itself.
    """

    name: str
    example: dict[str, torch.Tensor]
    module: nn.Module | None = None
    graph: onnx.ModelProto | None = None
    keywords: bool = False
    source: str = "module"
    weights: str = "as given"
    precision: str = "fp32"
    changes: tuple[str, ...] = ()
    edits: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()
    origin: Model | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.module is None and self.graph is None:
            raise LoadError(f"{self.name} holds neither a torch module nor an ONNX graph; give at least one.")
        if not self.example:
            raise LoadError(f"{self.name} has no example inputs; give wb.load(…, inputs=…) one batch of them.")
        if self.module is not None:
            self.module.eval()

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Specification of each input: what a graph declares, or else the example's shape with the batch axis open."""
        declared = {} if self.graph is None else layers.declared_shapes(self.graph)
        batch = getattr(self.module, "fixed_batch", None)
        return tuple(
            TensorSpec(name, declared.get(name, (batch, *value.shape[1:])), str(value.dtype).removeprefix("torch."))
            for name, value in self.example.items()
        )

    def run_module(self, *inputs: torch.Tensor) -> Any:
        """Call the torch module on inputs in order, by position or by keyword as it wants them."""
        if self.module is None:
            raise LoadError(f"{self.name} is an ONNX graph without a torch module; compile it with wb.OnnxRuntime().")
        if self.keywords:
            return self.module(**dict(zip(self.example, inputs, strict=True)))
        return self.module(*inputs)

    @cached_property
    def _exported(self) -> onnx.ModelProto:
        return export.to_onnx(self.module, self.example, self.keywords, self.name)

    def onnx(self) -> onnx.ModelProto:
        """The ONNX graph: the one it holds, or else the module's export (made once, batch axis dynamic)."""
        return self.graph if self.graph is not None else self._exported

    @cached_property
    def layers(self) -> pd.DataFrame:
        """A row per layer in execution order: layer, type, input_shape, output_shape, parameters, macs, input_bytes,
        weight_bytes, output_bytes.

        Shapes, MACs and bytes are those of one sample. A module's layers are its leaf modules and the operations
        between them; a graph's are its nodes.
        """
        if self.module is not None:
            return layers.module_table(self)
        return layers.graph_table(self.graph, {name: tuple(value.shape) for name, value in self.example.items()})

    @property
    def parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        if self.module is not None:
            return sum(p.numel() for p in self.module.parameters())
        return layers.graph_parameters(self.graph)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return int(self.layers["macs"].sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of structure and weights, as hex; the same in every process."""
        digest = hashlib.sha256()
        if self.module is not None:
            # the printed module stands for its structure: leaf types and their settings, without memory addresses
            digest.update(repr(self.module).encode())
            for part in self.module.modules():  # what a traced or scripted module computes is not in its repr
                if isinstance(part, torch.jit.ScriptModule):
                    digest.update(part.code.encode() if hasattr(part, "forward") else b"")
                elif isinstance(getattr(part, "graph", None), fx.Graph):
                    digest.update(str(part.graph).encode())
            for key, value in sorted(self.module.state_dict().items()):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if self.graph is not None:
            digest.update(self.graph.SerializeToString(deterministic=True))
        for spec in self.inputs:
            digest.update(str(spec).encode())
        return digest.hexdigest()

    def changed(self, change: str, **fields: Any) -> Model:
        """A copy with some fields replaced and `change` recorded; a new module drops the old graph, and conversely.

        Its `origin` is this model's, or else this model.
        """
        if "module" in fields:
            fields.setdefault("graph", None)
        if "graph" in fields:
            fields.setdefault("module", None)
        changes = self.changes if not change or change in self.changes else (*self.changes, change)
        fields.setdefault("origin", self.origin or self)
        return replace(self, changes=changes, **fields)

    def __repr__(self) -> str:
        kind = "module" if self.module is not None else "ONNX graph"
        ins = ", ".join(str(s) for s in self.inputs)
        size = f"{self.parameters:,} parameters"
        return f"<Model {self.name}: {kind}, {size}, {self.precision}, weights {self.weights}; {ins}>"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self)[1:-1])}</p>" + self.layers.to_html(index=False, border=0, escape=True)
