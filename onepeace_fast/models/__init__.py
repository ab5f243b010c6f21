"""Models built from the layers."""

from onepeace_fast.models.base import OnePeaceEncoder
from onepeace_fast.models.classify import OnePeaceClassify
from onepeace_fast.models.pretrain import OnePeacePretrain
from onepeace_fast.models.retrieval import OnePeaceRetrieval

__all__ = ["OnePeaceClassify", "OnePeaceEncoder", "OnePeacePretrain", "OnePeaceRetrieval"]
