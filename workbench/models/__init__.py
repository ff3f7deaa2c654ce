"""Models: what is loaded, looked at, changed and exported."""

from __future__ import annotations

from workbench.models.load import load
from workbench.models.model import Model, TensorSpec

__all__ = ["Model", "TensorSpec", "load"]
