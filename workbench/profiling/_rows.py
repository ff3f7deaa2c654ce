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
    medians = [float(np.median(o.times_ms)) for o in operations]
    shares = None if layers is None else _shared_out(operations, medians, layers)
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
        if shares is not None:
            row |= _from_layers(layers, *shares[index], batch)
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


def _from_layers(layers: pd.DataFrame, own: list[int], counted: list[int], batch: int) -> dict[str, Any]:
    """What the model knows of a row: shapes of its `own` entries of the layer table, sums over those it counts."""
    if not own:
        return {"macs": math.nan, "parameters": math.nan}
    first, last, counts = layers.iloc[own[0]], layers.iloc[own[-1]], layers.iloc[counted]
    # what lies between fused layers is never written
    read, written = batch * float(first["input_bytes"]), batch * float(last["output_bytes"])
    return {
        "macs": batch * float(counts["macs"].sum()),
        "parameters": float(counts["parameters"].sum()),
        "input_shape": first["input_shape"],
        "output_shape": last["output_shape"],
        "read_bytes": read + float(counts["weight_bytes"].sum()),
        "written_bytes": written,
        "activation_bytes": read + written,
    }


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


def _shared_out(
    operations: Sequence[OpTiming], medians: Sequence[float], layers: pd.DataFrame
) -> list[tuple[list[int], list[int]]]:
    """For each operation the entries of the layer table it belongs to, and those that count for it.

    An entry counts once. A layer that is called as often as operations compute it gives each its own entry; otherwise
    the slowest of them counts it all. A quantiser goes under the layer it serves and computes none of it.
    """
    entries: dict[str, list[int]] = {}
    for position, layer in enumerate(layers["layer"]):
        entries.setdefault(layer, []).append(position)
    carriers: dict[str, list[int]] = {}
    moves: dict[str, list[int]] = {}
    for index, operation in enumerate(operations):
        for layer in operation.layers:
            (moves if operation.kind == "move" else carriers).setdefault(layer, []).append(index)
    own: list[list[int]] = [[] for _ in operations]
    counted: list[list[int]] = [[] for _ in operations]
    for layer, positions in entries.items():
        computing = carriers.get(layer) or moves.get(layer, [])
        if len(computing) == len(positions):
            for index, position in zip(computing, positions, strict=True):
                own[index].append(position)
                counted[index].append(position)
        elif computing:
            for index in computing:
                own[index].append(positions[0])
            counted[max(computing, key=lambda i: medians[i])] += positions
        if computing is not moves.get(layer):
            for index in moves.get(layer, ()):
                own[index].append(positions[0])
    return [(sorted(mine), sorted(mine_counted)) for mine, mine_counted in zip(own, counted, strict=True)]
