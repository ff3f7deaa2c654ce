"""What ONNX Runtime's arena is asked for in one run, as its own log says, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from workbench.deployment import OnnxRuntime
from workbench.deployment.onnxruntime import GRAPH_LEVELS
from workbench.errors import BackendError
from workbench.models.model import Model

_MARK = "the run that counts"
_ARENA = "Creating BFCArena for Cpu"
_ASKED = re.compile(r"Extending BFCArena for Cpu\b.* num_bytes: (\d+)")
_GROWN = re.compile(r"Extended allocation by (\d+) bytes")
_SHRUNK = re.compile(r"Cpu BFC Arena shrunk by (\d+) bytes")

# The arena keeps nothing between runs and grows by what it is asked for, so that it has to grow by all that a run
# takes. By its second run of one shape a session has laid out the activations as one block. An arena that a user sets
# up belongs to the whole process, and can be set up once: hence a process of its own. Outputs are bound to memory
# outside the arena, as inputs are, in every run: one left in the arena would keep the room around it from being freed.
_PROGRAM = f"""
import sys
import numpy, onnxruntime
folder, threads, level = sys.argv[1:]
onnxruntime.set_default_logger_severity(0)
arena = onnxruntime.OrtArenaCfg({{"arena_extend_strategy": 1, "initial_chunk_size_bytes": 256}})
kinds = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", *kinds), arena)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
options.add_session_config_entry("session.use_env_allocators", "1")
options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
apart = onnxruntime.SessionOptions()
apart.enable_cpu_mem_arena = False
cpu = ["CPUExecutionProvider"]
first = onnxruntime.InferenceSession(folder + "/model.onnx", apart, providers=cpu)
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=cpu)
shrink = onnxruntime.RunOptions()
shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
arrays = numpy.load(folder + "/inputs.npz")
feeds = {{i.name: arrays[i.name] for i in session.get_inputs()}}
names = [o.name for o in session.get_outputs()]
binding = session.io_binding()
for name, array in feeds.items():
    binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
for name, array in zip(names, first.run(names, feeds)):
    binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
session.run_with_iobinding(binding, shrink)
session.run_with_iobinding(binding, shrink)
print({_MARK!r}, file=sys.stderr, flush=True)
session.run_with_iobinding(binding, shrink)
"""


def planned_bytes(model: Model, backend: OnnxRuntime, example: dict[str, np.ndarray]) -> int:
    """Bytes of the block of activations a session lays out, and of scratch its kernels take, for these inputs.

    Inputs, outputs and weights are not among them.

    Raises
    ------
    BackendError
        If ONNX Runtime does not run the model so, or its log does not say what its arena does.
    """
    with tempfile.TemporaryDirectory(prefix="workbench-plan-") as folder:
        Path(folder, "model.onnx").write_bytes(model.onnx().SerializeToString())
        np.savez(Path(folder, "inputs.npz"), **example)
        settings = [folder, str(backend.thread_count), GRAPH_LEVELS[backend.graph_level]]
        command = [sys.executable, "-c", _PROGRAM, *settings]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    log = run.stderr
    if run.returncode:
        why = (log.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise BackendError(f"ONNX Runtime does not tell the memory it plans for {model.name}: {why}")
    if _ARENA not in log:
        raise BackendError(
            "This version of ONNX Runtime does not log what its arena is asked for, so what it plans cannot be told. "
            "memory_counters says what its process takes."
        )
    before, _, during = log.partition(_MARK)
    if sum(map(int, _GROWN.findall(before))) > sum(map(int, _SHRUNK.findall(before))):
        # preparing weights can leave room in the arena, which a run then takes without asking
        raise BackendError(
            f"What ONNX Runtime plans for {model.name} cannot be told: its arena keeps memory from when the weights "
            "were prepared, and uses it again. memory_counters says what its process takes."
        )
    return sum(map(int, _ASKED.findall(during)))
