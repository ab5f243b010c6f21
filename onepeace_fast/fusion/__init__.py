"""The fused computation inside a live model: ``fuse``, its families, and the way back."""

from onepeace_fast.fusion.fuse import FusedModel, fuse

__all__ = ["FusedModel", "fuse"]
