"""`read_tensorrt`: what TensorRT recorded of an engine, opened as a profile without a GPU and without TensorRT.

The files are those of ``trtexec --exportLayerInfo --exportProfile`` and of NVIDIA's TREx scripts around it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.deployment import OpTiming, Port
from workbench.errors import LoadError
from workbench.profiling import _rows
from workbench.profiling import _tensorrt_names as names
from workbench.profiling._recorded import Entry, load
from workbench.profiling.profile import Profile

# layer types that compute nothing of the model; the first two run no kernel, and some versions give them no time
_IDLE = ("noop", "constant")
_MOVES = {*_IDLE, "reformat", "shuffle", "cast", "identity", "copy", "quantize", "dequantize"}
_DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16", "half": "float16", "fp16": "float16", "float16": "float16",
    "float": "float32", "fp32": "float32", "float32": "float32", "int8": "int8", "uint8": "uint8", "int4": "int4",
    "int32": "int32", "int64": "int64", "bool": "bool", "fp8": "float8_e4m3fn",
}  # fmt: skip
_DTYPE = re.compile(rf"\b({'|'.join(sorted(_DTYPES, key=len, reverse=True))})\b", re.IGNORECASE)
_PRECISIONS = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8", "int4": "int4",
    "float8_e4m3fn": "fp8",
}  # fmt: skip


def read_tensorrt(folder: str | Path, *, graph: str = "graph.json", profile: str = "profile.json") -> Profile:
    """The profile of a TensorRT engine that was recorded as JSON, perhaps elsewhere and long ago.

    A row's layers are the module paths that its weights name (``layer1.0.conv1``), and otherwise its ONNX nodes. A
    reformatting copy goes under the layer it is made for, a quantiser under the one whose numbers it writes. Precision
    is that of the numbers as they are stored: TF32 kernels, which read fp32, count as fp32.

    Parameters
    ----------
    folder
        Where the files are; ``profile.metadata.json``, ``build.metadata.json`` and ``metadata.json`` are read where
        they are there, and may be missing.
    graph
        The engine inspector's file: layers and bindings, at any level of detail that names the layers.
    profile
        The profiler's file: one time for each layer, of which the median over the iterations counts, else the mean.

    Returns
    -------
    Profile
        One time for each row. `end_to_end_ms` is the mean latency that trtexec measured without the profiler, as
        NVIDIA publishes it, and the sum of the rows where no such figure was recorded; the rows, timed one by one, may
        add up to more. `overhead_ms` is NaN and `environment` None. A row the graph does not describe is of kind
        ``unknown``. `batch` is 1 where the files do not tell.

    Raises
    ------
    LoadError
        If a file is missing, too large, cut off or of another form, or if the two are not of one engine; the file and
        the place in it are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoadError(f"{folder} is no folder. Give the folder that holds {graph} and {profile}.")
    engine = Entry.of(load(folder / graph), graph)
    layers = _layers(engine, graph)
    recorded = {name: _optional(folder / name) for name in (_metadata(profile), "build.metadata.json")}
    about = recorded[_metadata(profile)]
    operations = _served(_operations(_joined(layers, _times(load(folder / profile), profile), graph, profile)))
    whole_ms = _end_to_end_ms(about) or sum(o.times_ms[0] for o in operations)
    if not whole_ms > 0:
        raise LoadError(f"{profile}: all times are 0, so that it says nothing. Record more iterations.")
    batch = _batch(layers, _bindings(engine), about)
    model = recorded["build.metadata.json"].part("model_options").text("Model")
    device = about.part("device_information").text("Selected Device") or _device(folder / "metadata.json")
    return Profile(
        rows=_rows.table(operations, whole_ms, None, batch),
        operations=tuple(operations),
        end_to_end_ms=whole_ms,
        overhead_ms=math.nan,
        model_name=Path(model).stem or folder.resolve().name,
        backend=None,
        backend_label=", ".join(filter(None, ("TensorRT", device))),
        precision=_precision(operations),
        batch=batch,
        contended=False,
        environment=None,
    )


@dataclass(frozen=True)
class _Layer:
    """One layer of the engine as the inspector describes it; `about` is empty where it only names it."""

    name: str
    type: str
    about: Entry
    reads: tuple[Port, ...]
    writes: tuple[Port, ...]


def _layers(engine: Entry, file: str) -> list[_Layer]:
    if "Layers" not in engine:
        raise LoadError(
            f"{file} has no list of Layers, so that it is not what TensorRT's engine inspector writes, or of a version "
            "this library does not know. Record it with trtexec --exportLayerInfo."
        )
    found = []
    for index, value in enumerate(engine.listed("Layers")):
        where = f"{file}, layer {index}"
        if isinstance(value, str):
            value = {"Name": value}
        entry = Entry.of(value, where)
        name = entry.text("Name")
        if not name:
            raise LoadError(f"{where} has no Name, so that no time can be found for it. Record the engine again.")
        entry = Entry(entry.values, f"{where} ({name[:60]!r})")
        reads, writes = (tuple(_port(part) for part in entry.parts(key)) for key in ("Inputs", "Outputs"))
        found.append(_Layer(name, entry.text("LayerType"), entry, reads, writes))
    if not found:
        raise LoadError(
            f"{file} lists no layers: the engine was built with a profiling verbosity of none. Build it again with "
            "trtexec --profilingVerbosity=detailed."
        )
    return found


def _port(entry: Entry) -> Port:
    described = entry.text("Format/Datatype") or entry.text("Datatype")
    return Port(entry.text("Name"), entry.lengths("Dimensions"), _dtype(described))


def _dtype(described: str) -> str:
    """``Thirty-two wide channel vectorized row major Int8 format`` as ``int8``; empty where it says nothing known."""
    found = _DTYPE.search(described)
    return _DTYPES[found[1].lower()] if found else ""


def _times(values: object, file: str) -> list[tuple[str, float]]:
    """Name and milliseconds of each record of the profiler, in order."""
    if not isinstance(values, list):
        raise LoadError(f"{file} is no list of records. Record it with trtexec --exportProfile.")
    entries = [Entry.of(value, f"{file}, record {i}") for i, value in enumerate(values)]
    count = None
    if entries and "name" not in entries[0] and "count" in entries[0]:
        count = entries.pop(0).whole("count")
    found = []
    for entry in entries:
        name = entry.text("name")
        if not name:
            raise LoadError(f"{entry.where} has no name, so that its layer is not known. Record the profile again.")
        entry = Entry(entry.values, f"{entry.where} ({name[:60]!r})")
        key = next((key for key in ("medianMs", "averageMs") if key in entry), "")
        if key:
            found.append((name, entry.milliseconds(key)))
        elif "timeMs" in entry and count:
            found.append((name, entry.milliseconds("timeMs") / count))
        else:
            raise LoadError(
                f"{entry.where} has neither medianMs nor averageMs, nor a timeMs with the count of iterations at the "
                "start of the file. Record it with trtexec --exportProfile."
            )
    return found


def _joined(
    layers: Sequence[_Layer], times: Sequence[tuple[str, float]], graph: str, profile: str
) -> list[tuple[_Layer, float, bool]]:
    """Each layer with its time and whether the graph describes it, in the graph's order.

    Names that occur several times are taken in turn. A record of a layer that the graph does not have follows the
    record before it.
    """
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for index, layer in enumerate(layers):
        waiting[layer.name].append(index)
    placed: list[tuple[float, _Layer, float, bool]] = []
    last = -1
    for name, time_ms in times:
        known = bool(waiting.get(name))
        if known:
            last = waiting[name].popleft()
        layer = layers[last] if known else _Layer(name, "", Entry({}, profile), (), ())
        placed.append((last if known else last + 0.5, layer, time_ms, known))
    if not any(known for *_, known in placed):
        raise LoadError(
            f"{profile} has no time for any layer of {graph}: they are of two engines. Record both at once."
        )
    timeless = sorted(index for left in waiting.values() for index in left)
    if lost := [i for i in timeless if layers[i].type.lower() not in _IDLE]:
        first = layers[lost[0]]
        raise LoadError(
            f"{first.about.where} has no time in {profile}" + (f", nor have {len(lost) - 1} more" * (len(lost) > 1))
            + ". The two files are not of one engine, or one was cut off; record both in one run."
        )  # fmt: skip
    placed += [(i, layers[i], 0.0, True) for i in timeless]
    return [row[1:] for row in sorted(placed, key=lambda row: row[0])]


def _operations(rows: Sequence[tuple[_Layer, float, bool]]) -> list[OpTiming]:
    own = [names.parts(layer.name, layer.about.text("Metadata")) for layer, *_ in rows]
    found = []
    for (layer, time_ms, known), parts, layers in zip(rows, own, names.layers(own), strict=True):
        told = layer.type or names.operator(parts)
        moves = layer.type.lower() in _MOVES or names.copies(layer.name, parts)
        kind = "unknown"
        if known and (moves or told or layers):
            kind = "move" if moves else "layer"
        about = _computed(layer, kind)
        told = told or ("move" if moves else "unknown")
        found.append(OpTiming(layer.name, told, layers, (time_ms,), kind, layer.reads, layer.writes, **about))
    return found


def _computed(layer: _Layer, kind: str) -> dict[str, Any]:
    """What a layer computes, from its own attributes; nothing where they do not tell."""
    if kind == "move":
        return {"weight_bytes": 0, "macs": 0.0, "parameters": 0}
    about = layer.about
    # a convolution fused with a pooling has its attributes under names of their own
    prefix = "Conv" if "ConvKernel" in about else ""
    held = [about.part(prefix + key) for key in ("Weights", "Bias")]
    counts = [entry.whole("Count") or 0 for entry in held]
    dtypes = [_dtype(entry.text("Type")) for entry in held]
    precision = _PRECISIONS.get(dtypes[0] or (layer.reads[0].dtype if layer.reads else ""), "")
    if prefix + "Weights" not in about:
        weightless = about.text("ParameterType") == "Pooling"
        told = {"weight_bytes": 0, "macs": 0.0, "parameters": 0} if weightless else {}
        return {**told, "precision": precision, "kernel": about.wholes("WindowSize")}
    nbytes = sum(Port("", (n,), dtype).nbytes for n, dtype in zip(counts, dtypes, strict=True) if n)
    return {
        "weight_bytes": None if math.isnan(nbytes) else int(nbytes),
        "precision": precision,
        "macs": _macs(layer, prefix),
        "parameters": sum(counts),
        "kernel": about.wholes(prefix + "Kernel"),
    }


def _macs(layer: _Layer, prefix: str) -> float | None:
    """Multiply-accumulates of a convolution; None where a length is open or its attributes are not all there."""
    about = layer.about
    kernel, stride = about.wholes(prefix + "Kernel"), about.wholes(prefix + "Stride")
    maps, groups = about.whole(prefix + "OutMaps"), about.whole(prefix + "Groups")
    if not (kernel and maps and groups and layer.reads and layer.writes):
        return None
    inside, outside = layer.reads[0].shape, layer.writes[0].shape
    if len(inside) != 2 + len(kernel) or len(outside) != len(inside) or None in inside + outside:
        return None
    pixels = outside[2:]
    if "deconv" in layer.type.lower():
        pixels = inside[2:]
    elif prefix:  # what it writes has been through the pooling
        before, after = about.wholes("ConvPrePadding"), about.wholes("ConvPostPadding")
        dilation = about.wholes("ConvDilation")
        explicit = about.text("ConvPaddingMode") == "kEXPLICIT_ROUND_DOWN"
        if not explicit or {len(x) for x in (before, after, dilation, stride)} != {len(kernel)} or 0 in stride:
            return None
        pixels = tuple(
            (n + p + q - d * (k - 1) - 1) // s + 1
            for n, p, q, d, k, s in zip(inside[2:], before, after, dilation, kernel, stride, strict=True)
        )
    return float(inside[0] * inside[1] * maps // groups * math.prod(kernel) * math.prod(pixels))


def _served(operations: Sequence[OpTiming]) -> list[OpTiming]:
    """Moves that name no layer under the layers whose numbers they carry: of what writes them, or else reads them."""
    found = list(operations)
    readers: dict[str, int] = {}
    for index in reversed(range(len(found))):
        readers.update((port.name, index) for port in found[index].reads)
    writers: dict[str, int] = {}
    for index, operation in enumerate(found):
        if operation.kind == "move" and not operation.layers:
            before = next((found[writers[p.name]].layers for p in operation.reads if p.name in writers), ())
            found[index] = replace(operation, layers=before)
        writers.update((port.name, index) for port in operation.writes)
    for index in reversed(range(len(found))):
        operation = found[index]
        if operation.kind == "move" and not operation.layers:
            after = next((found[readers[p.name]].layers for p in operation.writes if p.name in readers), ())
            found[index] = replace(operation, layers=after or names.quantisers(names.parts(operation.name)))
    return found


def _metadata(profile: str) -> str:
    return f"{profile.removesuffix('.json')}.metadata.json"


def _optional(path: Path) -> Entry:
    return Entry.of(load(path) if path.is_file() else {}, path.name)


def _end_to_end_ms(about: Entry) -> float:
    """The mean latency trtexec reports; 0 where there is none that was measured without the profiler."""
    latency = about.part("performance_summary").times("Latency")
    if not latency or about.part("inference_options").text("Separate profiling") == "Disabled":
        return 0.0
    if len(latency) < 3 or not latency[0] <= latency[2] <= latency[1]:
        raise LoadError(
            f"{about.where}, performance_summary: Latency is {list(latency)}, where minimum, maximum and mean are "
            "expected in this order. Record it again, or take the file away."
        )
    return latency[2]


def _bindings(engine: Entry) -> list[str]:
    """Names of the engine's inputs and outputs."""
    found = []
    for index, value in enumerate(engine.listed("Bindings")):
        name = value if isinstance(value, str) else Entry.of(value, f"{engine.where}, Bindings[{index}]").text("Name")
        found.append(name)
    return found


def _batch(layers: Sequence[_Layer], bindings: Sequence[str], about: Entry) -> int:
    """Samples per call: the first length of the engine's first input, or else what trtexec was told."""
    options = about.part("inference_options")
    if options.text("Batch") not in ("", "Explicit"):
        raise LoadError(
            f"{about.where}, inference_options: Batch is {options.text('Batch')!r}, so that the shapes in the graph "
            "have no batch axis. Build the engine from ONNX, which has an explicit batch, and record it again."
        )
    told = re.search(r"=(\d+)", options.text("Input inference shape"))
    for layer in layers:
        for port in layer.reads:
            if port.name in bindings and port.shape and port.shape[0]:
                return port.shape[0]
    return max(int(told[1]), 1) if told else 1


def _device(path: Path) -> str:
    """The name of the first device TREx found, where its file is there."""
    values = load(path) if path.is_file() else []
    return Entry.of(values[0], path.name).text("Name") if isinstance(values, list) and values else ""


def _precision(operations: Sequence[OpTiming]) -> str:
    """The precision that most of the time is spent in; empty where none is known."""
    spent: dict[str, float] = defaultdict(float)
    for operation in operations:
        if operation.precision:
            spent[operation.precision] += operation.times_ms[0]
    return max(spent, key=spent.__getitem__, default="")
