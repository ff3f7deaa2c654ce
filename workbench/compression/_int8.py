"""int8 in an ONNX graph, by ONNX Runtime's quantisation tools; the one file that knows them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import version_converter
from onnxruntime.quantization import (
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    TensorData,
    TensorsData,
    quantize_dynamic,
)
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from workbench.compression._calibration import Reference, Samples, observe, reference
from workbench.compression._onnx_graph import (
    PRODUCTS,
    carry_layers,
    drop_unused_domains,
    gemms_as_matmuls,
    is_transformer,
    opset,
    without_weight_inputs,
)
from workbench.errors import StepError, WorkbenchError
from workbench.jobs import SILENT, Progress

_PER_CHANNEL_OPSET = 13  # the first in which a weight may have a scale for each channel


class StaticInt8:
    """Q/DQ with ranges taken from calibration data: u8 activations, s8 weights per output channel.

    Parameters
    ----------
    graph
        A float32 graph.
    samples
        At least one.
    calibration
        How ranges are chosen; see `_ranges.range_from_histogram`.
    reduce_range
        Weights in 7 bits instead of 8.

    Attributes
    ----------
    graph
        The float32 graph as it is quantised: optimised, shapes inferred, every node named.
    reference
        What it puts out for the first calibration samples.

    Raises
    ------
    StepError
        If an output or a range is not finite, or ONNX Runtime cannot run or quantise the graph.
    """

    def __init__(
        self,
        graph: onnx.ModelProto,
        samples: Samples,
        *,
        calibration: str,
        reduce_range: bool,
        progress: Progress = SILENT,
    ):
        self.graph, self._reduce_range = prepared(graph), reduce_range
        self._products_only = is_transformer(self.graph)
        everything = {*QDQRegistry, *QLinearOpsRegistry}
        self._kinds = list(PRODUCTS) if self._products_only else sorted(everything)
        ranges, self.reference = observe(self.graph, self._kinds, samples, calibration, progress=progress)
        self._ranges = TensorsData(
            CalibrationMethod.MinMax,
            {name: TensorData(lowest=np.float32(a), highest=np.float32(b)) for name, (a, b) in ranges.items()},
        )

    def quantised(self, without: Collection[str] = (), only: Collection[str] = ()) -> onnx.ModelProto:
        """The graph with Q/DQ; nodes `without` stay float32, and all but `only`, where any are given."""
        copied = onnx.ModelProto()
        copied.CopyFrom(self.graph)
        # what lies between products is float32 here: rounding their outputs too costs accuracy and buys no time
        options = {"OpTypesToExcludeOutputQuantization": list(PRODUCTS)} if self._products_only else {}
        with _by_onnx_runtime():
            quantizer = QDQQuantizer(
                copied,
                per_channel=True,
                reduce_range=self._reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=self._ranges,
                nodes_to_quantize=sorted(only),
                nodes_to_exclude=sorted(without),
                op_types_to_quantize=self._kinds,
                extra_options=options,
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            return quantizer.model.model


class DynamicInt8:
    """Weights of MatMul and Gemm in s8 per output channel; activations become u8 while running, by their own range.

    Parameters
    ----------
    graph
        A float32 graph.
    samples
        What `reference` is computed on; there may be none.
    reduce_range
        Weights in 7 bits instead of 8.

    Attributes
    ----------
    graph, reference
        As of `StaticInt8`.
    """

    def __init__(self, graph: onnx.ModelProto, samples: Samples, *, reduce_range: bool):
        # the tool would do so too, under other names, and transpose twice a weight that two share
        self.graph, self._reduce_range = gemms_as_matmuls(prepared(graph)), reduce_range
        self.reference: Reference = reference(self.graph, samples)

    def quantised(self, without: Collection[str] = (), only: Collection[str] = ()) -> onnx.ModelProto:
        """As `StaticInt8.quantised`."""

        def quantise(source: Path, target: Path) -> None:
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=list(PRODUCTS),
                per_channel=True,
                reduce_range=self._reduce_range,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=sorted(only),
                nodes_to_exclude=sorted(without),
            )

        return _through_files(self.graph, quantise)


def prepared(graph: onnx.ModelProto, least_opset: int = _PER_CHANNEL_OPSET) -> onnx.ModelProto:
    """A graph as quantisers want it, and what layers its nodes stand for.

    Batch normalisations are folded, constants computed, shapes inferred, every node has a name.

    Parameters
    ----------
    least_opset
        An older graph is converted to this one.
    """

    def prepare(source: Path, target: Path) -> None:
        # the exporter has inferred shapes already; the symbolic pass adds nothing and rejects odd graphs
        quant_pre_process(source, target, skip_symbolic_shape=True)

    result = _through_files(without_weight_inputs(graph), prepare)
    drop_unused_domains(result)
    if opset(result) < least_opset:
        with _by_onnx_runtime():
            result = version_converter.convert_version(result, least_opset)
    # noted shapes of weights are known anyway, and go stale where a Gemm's weight is transposed
    weights = {tensor.name for tensor in result.graph.initializer}
    kept = [value for value in result.graph.value_info if value.name not in weights]
    del result.graph.value_info[:]
    result.graph.value_info.extend(kept)
    for node in result.graph.node:
        node.name = node.name or node.output[0]
    carry_layers(graph, result)
    return result


def _through_files(graph: onnx.ModelProto, work: Callable[[Path, Path], None]) -> onnx.ModelProto:
    """Run one of ONNX Runtime's tools, which work on files, on a graph in memory."""
    with TemporaryDirectory(prefix="workbench-int8-") as folder, _by_onnx_runtime():
        source, target = Path(folder, "source.onnx"), Path(folder, "target.onnx")
        onnx.save(graph, source)  # handed over as a value, the graph would have its weights moved out of it
        work(source, target)
        return onnx.load(target)


@contextmanager
def _by_onnx_runtime() -> Iterator[None]:
    """Without the tools' remarks about settings that were chosen here on purpose; what they raise becomes ours."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    except WorkbenchError:
        raise
    except Exception as error:  # the tools raise anything from AssertionError to their own C++ types
        raise StepError(f"ONNX Runtime cannot quantise this graph: {type(error).__name__}: {error}") from error
    finally:
        root.setLevel(level)
