"""Whether this machine can drive an NVIDIA GPU at all; no package can be installed that makes up for a missing one."""

from __future__ import annotations

import ctypes
import sys
from functools import cache


@cache
def nvidia_driver() -> bool:
    """Whether the NVIDIA driver's library loads."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
