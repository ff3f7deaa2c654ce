"""What a person sees and touches: one file per panel, each answering one question."""

from widgets.panels.compare import ComparePanel
from widgets.panels.compress import CompressPanel
from widgets.panels.did import WhatItDid
from widgets.panels.model import ModelPanel
from widgets.panels.profile import ProfilePanel

__all__ = ["ComparePanel", "CompressPanel", "ModelPanel", "ProfilePanel", "WhatItDid"]
