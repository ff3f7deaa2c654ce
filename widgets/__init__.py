"""The workbench in JupyterLab: panels over the kernel's objects, and one app of them: ``Workbench(study)``."""

from widgets.app import Workbench
from widgets.panels import ComparePanel, CompressPanel, ModelPanel, ProfilePanel, WhatItDid
from widgets.selection import Selection

__all__ = ["ComparePanel", "CompressPanel", "ModelPanel", "ProfilePanel", "Selection", "WhatItDid", "Workbench"]
