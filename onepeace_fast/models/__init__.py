"""Models built from the layers."""

from onepeace_fast.models.pretrain import OnePeacePretrain

__all__ = ["OnePeacePretrain"]
