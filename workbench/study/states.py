"""A step's output as bytes and back, without ever pickling a module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
from safetensors.torch import load, save

from workbench.models import structure
from workbench.models.model import Model
from workbench.models.record import Record


def pack(model: Model) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a model (safetensors of its module, or its ONNX graph) and a JSON record of the rest."""
    record = {
        "precision": model.precision,
        "changes": list(model.changes),
        "edits": list(model.edits),
        "notes": list(model.notes),
        "records": [record.to_dict() for record in model.records],
        "kind": "module" if model.module is not None else "graph",
    }
    if model.module is None:
        return model.graph.SerializeToString(deterministic=True), record
    # cloned, because safetensors refuses tensors that share memory, as tied weights do
    return save({k: v.detach().clone().contiguous() for k, v in model.module.state_dict().items()}), record


def unpack(data: bytes, record: dict[str, Any], base: Model) -> Model:
    """The model that `pack` was given; `base` is the study's untouched model, from whose structure it is rebuilt."""
    graph = record["kind"] == "graph"
    return replace(
        base,
        module=None if graph else structure.rebuild(base.module, record["edits"], load(data)),
        graph=onnx.load_model_from_string(data) if graph else None,
        precision=record["precision"],
        changes=tuple(record["changes"]),
        edits=tuple(record["edits"]),
        notes=tuple(record["notes"]),
        records=tuple(Record.from_dict(r) for r in record.get("records", ())),
        origin=base,
    )
