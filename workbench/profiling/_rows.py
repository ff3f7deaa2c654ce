"""From an engine's operations and a model's layers to the rows of a profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.deployment import OpTiming

UNATTRIBUTED = "(unattributed)"
COLUMNS = [
    *("name", "layer", "type", "kind", "latency_ms", "latency_p95_ms", "share", "macs", "parameters"),
    *("input_shape", "output_shape", "read_bytes", "written_bytes", "activation_bytes", "intensity", "precision"),
]


def table(operations: Sequence[OpTiming], whole_ms: float, layers: pd.DataFrame | None, batch: int) -> pd.DataFrame:
    """The rows of a profile; see `Profile.frame`.

    Parameters
    ----------
    operations
        In execution order.
    whole_ms
        Of one call.
    layers
        The model's layer table, for one sample; None where there is no model, only what the operations say themselves.
    batch
        Samples per call.
    """
    known = None if layers is None else layers.drop_duplicates("layer").set_index("layer")
    medians = [float(np.median(o.times_ms)) for o in operations]
    owner = _owners(operations, medians)
    rows = []
    for index, (operation, median) in enumerate(zip(operations, medians, strict=True)):
        row: dict[str, Any] = {
            "name": operation.name,
            "layer": " + ".join(operation.layers),
            "type": operation.type,
            "kind": operation.kind,
            "latency_ms": median,
            "latency_p95_ms": float(np.percentile(operation.times_ms, 95)),
            "precision": operation.precision,
        }
        if known is not None:
            own = [layer for layer in operation.layers if layer in known.index]
            counted = [layer for layer in own if owner[layer] == index]
            row |= _from_layers(known, own, counted, batch)
        row |= _from_operation(operation)
        rows.append(row)
    left = whole_ms - sum(medians)
    rows.append({"name": UNATTRIBUTED, "layer": UNATTRIBUTED, "type": "unattributed", "kind": "unattributed"})
    rows[-1] |= {"latency_ms": left, "precision": ""}
    frame = pd.DataFrame(rows).reindex(columns=COLUMNS)
    frame["share"] = frame["latency_ms"] / whole_ms
    moved = frame["read_bytes"].astype(float) + frame["written_bytes"].astype(float)
    frame["intensity"] = 2 * frame["macs"].astype(float) / moved.where(moved > 0)
    return frame


def _from_layers(known: pd.DataFrame, own: list[str], counted: list[str], batch: int) -> dict[str, Any]:
    """What the model knows of the layers of one row, of which those in `counted` count for this row."""
    if not own:
        return {"macs": math.nan, "parameters": math.nan}
    first, last = known.loc[own[0]], known.loc[own[-1]]
    row = {
        "macs": batch * float(known.loc[counted, "macs"].sum()),
        "parameters": float(known.loc[counted, "parameters"].sum()),
        "input_shape": first["input_shape"],
        "output_shape": last["output_shape"],
    }
    if "input_bytes" in known:
        # what lies between fused layers is never written
        read, written = batch * float(first["input_bytes"]), batch * float(last["output_bytes"])
        weights = float(known.loc[counted, "weight_bytes"].sum())
        row |= {"read_bytes": read + weights, "written_bytes": written, "activation_bytes": read + written}
    return row


def _from_operation(operation: OpTiming) -> dict[str, Any]:
    """What the engine itself says, which holds for what it runs: another precision, another layout."""
    row: dict[str, Any] = {}
    if operation.macs is not None:
        row["macs"] = operation.macs
    if operation.parameters is not None:
        row["parameters"] = operation.parameters
    if operation.reads:
        row["input_shape"] = operation.reads[0].shape[1:]
    if operation.writes:
        row["output_shape"] = operation.writes[0].shape[1:]
    if operation.reads and operation.writes and operation.weight_bytes is not None:
        read, written = (sum(port.nbytes for port in ports) for ports in (operation.reads, operation.writes))
        row |= {
            "read_bytes": read + operation.weight_bytes,
            "written_bytes": written,
            "activation_bytes": read + written,
        }
    return row


def _owners(operations: Sequence[OpTiming], medians: Sequence[float]) -> dict[str, int]:
    """For each layer the row that counts its MACs: the slowest of those that compute it, so that it counts once.

    A quantiser goes under the layer it serves and computes none of it.
    """
    owner: dict[str, int] = {}
    for moves in (False, True):
        mine: dict[str, int] = {}
        for index, operation in enumerate(operations):
            if (operation.kind == "move") == moves:
                for layer in operation.layers:
                    if layer not in mine or medians[index] > medians[mine[layer]]:
                        mine[layer] = index
        owner = mine | owner
    return owner
