"""int8 as Q/DQ nodes in an ONNX graph, by ONNX Runtime's quantisation tools; the one file that knows them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from workbench.errors import StepError, WorkbenchError
from workbench.models.provenance import KEY, provenance

WEIGHTED = ("Gemm", "MatMul")
QUANTISED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}

_NORMALISATION = {"LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "RMSNormalization"}
_ATTENTION = {"Attention", "MultiHeadAttention"}


def input_names(graph: onnx.ModelProto) -> list[str]:
    """Names of the inputs a caller feeds, in order; old files list their weights as inputs too."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    return [value.name for value in graph.graph.input if value.name not in weights]


def fixed_batch(graph: onnx.ModelProto) -> int | None:
    """The batch size written into the graph, or None where it is free."""
    first = next(value for value in graph.graph.input if value.name in input_names(graph)[:1])
    axes = first.type.tensor_type.shape.dim
    return axes[0].dim_value if axes and axes[0].HasField("dim_value") else None


def is_transformer(graph: onnx.ModelProto) -> bool:
    """Whether there is layer normalisation or attention (a softmax that feeds a product of two activations)."""
    kinds = {node.op_type for node in graph.graph.node}
    if kinds & (_NORMALISATION | _ATTENTION):
        return True
    weights = {tensor.name for tensor in graph.graph.initializer}
    normalised = {node.output[0] for node in graph.graph.node if node.op_type == "Softmax"}
    return any(
        node.op_type == "MatMul" and normalised & set(node.input) and not weights & set(node.input)
        for node in graph.graph.node
    )


def static(
    graph: onnx.ModelProto,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    reduce_range: bool,
    report: Callable[[int], None],
) -> onnx.ModelProto:
    """Q/DQ with ranges taken from calibration data: u8 activations, s8 weights per output channel, min-max.

    Parameters
    ----------
    graph
        A float32 graph.
    batches
        Calibration inputs in small chunks, in the order of the graph's inputs; read twice at most one chunk at a time.
    reduce_range
        Weights in 7 bits instead of 8.
    report
        Called with the number of chunks done; may raise `Cancelled`.

    Raises
    ------
    StepError
        If there are no batches, if an output or a range is not finite, or if ONNX Runtime cannot quantise the graph.
    """
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise StepError(
            "Static int8 needs calibration samples, and the task has none. Build it with "
            'wb.Task.from_arrays(…, calibration=512), or use wb.Quantize("int8", mode="dynamic").'
        )
    names, products_only = input_names(graph), is_transformer(graph)
    _check_finite(graph, dict(zip(names, first, strict=True)))

    def chunks() -> Iterator[dict[str, np.ndarray]]:
        yield dict(zip(names, first, strict=True))
        for arrays in stream:
            yield dict(zip(names, arrays, strict=True))

    def quantise(source: Path, target: Path) -> None:
        quantize_static(
            source,
            target,
            _Reader(chunks(), report),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(WEIGHTED) if products_only else None,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # what lies between products is float32 here: rounding their outputs too costs accuracy and buys no time
            extra_options={"OpTypesToExcludeOutputQuantization": list(WEIGHTED)} if products_only else None,
        )

    result = _through_files(graph, quantise)
    for tensor in result.graph.initializer:
        if tensor.name.endswith("_scale") and not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise StepError(
                f"The range of {tensor.name.removesuffix('_scale')!r} over the calibration samples is not finite. "
                "Look for NaN or overflow in the data or the weights."
            )
    return result


def dynamic(graph: onnx.ModelProto, *, reduce_range: bool) -> onnx.ModelProto:
    """Weights of MatMul and Gemm in s8 per output channel; activations become u8 while running, by their own range."""

    def quantise(source: Path, target: Path) -> None:
        _untie_products(source)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=list(WEIGHTED),
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
        )

    result = _through_files(graph, quantise)
    if not any(node.op_type in QUANTISED for node in result.graph.node):
        raise StepError(
            "Dynamic int8 quantises products with a constant matrix (MatMul, Gemm), and this graph has none. "
            'Use wb.Quantize("int8"), which also covers convolutions.'
        )
    return result


class _Reader(CalibrationDataReader):
    def __init__(self, chunks: Iterator[dict[str, np.ndarray]], report: Callable[[int], None]):
        self._chunks, self._report, self._count = chunks, report, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        self._report(self._count)
        self._count += 1
        return next(self._chunks, None)


def _through_files(graph: onnx.ModelProto, quantise: Callable[[Path, Path], None]) -> onnx.ModelProto:
    """Run one of ONNX Runtime's tools, which work on files, on a graph in memory."""
    with TemporaryDirectory(prefix="workbench-int8-") as folder, _quiet():
        source, prepared, target = (Path(folder, f"{stage}.onnx") for stage in ("source", "prepared", "quantised"))
        onnx.save(graph, source)  # handed over as a value, the graph would have its weights moved out of it
        try:
            # the exporter has inferred shapes already; the symbolic pass adds nothing and rejects odd graphs
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            _forget_weight_shapes(prepared)
            quantise(prepared, target)
        except WorkbenchError:
            raise
        except Exception as error:  # the tools raise anything from AssertionError to their own C++ types
            raise StepError(f"ONNX Runtime cannot quantise this graph: {type(error).__name__}: {error}") from error
        return _tidied(onnx.load(target), graph)


def _tidied(result: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """The tools' result under the original's name, with its layers, and without operator sets nothing refers to."""
    result.graph.name, result.graph.doc_string = original.graph.name, original.graph.doc_string
    used = {"" if node.domain == "ai.onnx" else node.domain for node in result.graph.node} | {""}
    kept = [opset for opset in result.opset_import if opset.domain in used]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    _carry_layers(original, result)
    return result


def _carry_layers(original: onnx.ModelProto, result: onnx.ModelProto) -> None:
    """Write down which layers each node of the result stands for.

    A node kept its name, or the output of one it replaced or absorbed; what is new around it serves a layer: a
    quantised weight the layer that reads it, a quantised activation the layer that puts it out.
    """
    layers = provenance(original)
    by_output = {out: layers[node.name or node.output[0]] for node in original.graph.node for out in node.output}
    constant = {tensor.name for tensor in result.graph.initializer}
    found: dict[str, tuple[str, ...]] = {}
    readers: dict[str, str] = {}
    for node in result.graph.node:
        own = dict.fromkeys(layers.get(node.name, ()))
        own.update(dict.fromkeys(layer for out in node.output for layer in by_output.get(out, ())))
        found[node.output[0]] = tuple(own)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in constant and not own:
            found[node.output[0]] = found.get(node.input[0], ())
        for name in node.input:
            readers.setdefault(name, node.output[0])
    for node in reversed(result.graph.node):  # in execution order, so a reader is settled before what it reads
        reader = next((readers[out] for out in node.output if out in readers), "")
        stands_for = found[node.output[0]] = found[node.output[0]] or found.get(reader, ())
        if stands_for:
            kept = [entry for entry in node.metadata_props if entry.key != KEY]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
            node.metadata_props.add(key=KEY, value=json.dumps(stands_for))


def _forget_weight_shapes(path: Path) -> None:
    """Drop noted shapes of weights: they are known anyway, and go stale where a Gemm's weight is transposed."""
    graph = onnx.load(path)
    weights = {tensor.name for tensor in graph.graph.initializer}
    kept = [value for value in graph.graph.value_info if value.name not in weights]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(kept)
    onnx.save(graph, path)


def _untie_products(path: Path) -> None:
    """Give each Gemm a weight of its own.

    The dynamic tool transposes a Gemm's weight where it lies; one that two share, as equal weights come to be when the
    graph is prepared, would be transposed twice.
    """
    graph = onnx.load(path)
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    readers = Counter(name for node in graph.graph.node for name in node.input)
    for number, node in enumerate(graph.graph.node):
        if node.op_type == "Gemm" and node.input[1] in weights and readers[node.input[1]] > 1:
            own = graph.graph.initializer.add()
            own.CopyFrom(weights[node.input[1]])
            own.name = f"{node.input[1]}_of_{number}"
            node.input[1] = own.name
    onnx.save(graph, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tools' remarks about settings that were chosen here on purpose; errors still come through."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _check_finite(graph: onnx.ModelProto, feed: dict[str, np.ndarray]) -> None:
    try:
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs = session.run(None, feed)
    except Exception as error:  # ONNX Runtime's errors share no base class but this one
        raise StepError(f"The graph does not run on the calibration samples: {error}") from error
    for spec, value in zip(session.get_outputs(), outputs, strict=True):
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise StepError(
                f"Output {spec.name!r} is NaN or infinite on the calibration samples, so no range can be taken. "
                "Check that preprocessing and weights belong together."
            )
