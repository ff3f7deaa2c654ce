"""Where the time and the memory go, layer by layer, on every engine."""

from workbench.profiling.advice import advice
from workbench.profiling.align import Alignment, align
from workbench.profiling.ceilings import Ceilings, ceilings
from workbench.profiling.memory import MemoryCounters, MemoryTimeline, memory_counters, memory_timeline
from workbench.profiling.profile import Profile, profile
from workbench.profiling.roofline import Roofline, roofline
from workbench.profiling.sqnr import Distances, sqnr, sqnr_db
from workbench.profiling.tensorrt import read_tensorrt

__all__ = [
    "Alignment",
    "Ceilings",
    "Distances",
    "MemoryCounters",
    "MemoryTimeline",
    "Profile",
    "Roofline",
    "advice",
    "align",
    "ceilings",
    "memory_counters",
    "memory_timeline",
    "profile",
    "read_tensorrt",
    "roofline",
    "sqnr",
    "sqnr_db",
]
