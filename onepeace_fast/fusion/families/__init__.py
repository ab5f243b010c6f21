"""The families that ``fuse`` knows, each in a file of its own."""

from onepeace_fast.fusion.families.bagel import Bagel
from onepeace_fast.fusion.families.mixture_of_transformers import MixtureAttention, MixtureFeedForward
from onepeace_fast.fusion.families.own_model import OwnModel
from onepeace_fast.fusion.family import Fusion

FAMILIES: tuple[type[Fusion], ...] = (OwnModel, Bagel, MixtureFeedForward, MixtureAttention)
