"""Where the time goes, layer by layer."""

from workbench.profiling.profile import Profile, profile

__all__ = ["Profile", "profile"]
