"""The families that ``fuse`` knows, each in a file of its own."""

from onepeace_fast.fusion.families.bagel import Bagel
from onepeace_fast.fusion.families.mixture_of_transformers import MixtureAttention, MixtureFeedForward
from onepeace_fast.fusion.families.one_peace import OnePeaceEncoder
from onepeace_fast.fusion.families.own_model import OwnModel
from onepeace_fast.fusion.families.t5 import T5Encoder
from onepeace_fast.fusion.families.t5_decoder import T5Decoder
from onepeace_fast.fusion.families.torchscale import Torchscale
from onepeace_fast.fusion.families.windows import BeitLayer, SwinAttention
from onepeace_fast.fusion.family import Fusion

FAMILIES: tuple[type[Fusion], ...] = (
    OwnModel, OnePeaceEncoder, Torchscale, Bagel, MixtureFeedForward, MixtureAttention, T5Encoder, T5Decoder,
    SwinAttention, BeitLayer,
)  # fmt: skip
