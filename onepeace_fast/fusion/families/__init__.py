"""The families that ``fuse`` knows, each in a file of its own."""

from onepeace_fast.fusion.families.one_peace import OnePeaceEncoder
from onepeace_fast.fusion.families.own_model import OwnModel
from onepeace_fast.fusion.families.t5 import T5Encoder
from onepeace_fast.fusion.families.torchscale import Torchscale
from onepeace_fast.fusion.families.windows import BeitLayer, SwinAttention
from onepeace_fast.fusion.family import Fusion

FAMILIES: tuple[type[Fusion], ...] = (OwnModel, OnePeaceEncoder, Torchscale, T5Encoder, SwinAttention, BeitLayer)
