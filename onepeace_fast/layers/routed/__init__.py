"""Modules with weights for each modality, for models of one's own: expert m serves modality m of a route plan.

    forward(tokens, plan)               tokens in their own order, as ``RoutePlan.pack`` takes them; the same comes out
    forward(rows, plan, packed=True)    packed rows, ``plan.pack(tokens)``; packed rows come out

A route plan is built once for a batch and serves all modules and layers: none of them reads anything on the host.
"""

from onepeace_fast.layers.routed.ffn import ExpertFFN, RoutedFFN
from onepeace_fast.layers.routed.linear import RoutedLinear
from onepeace_fast.layers.routed.norm import RoutedNorm

__all__ = ["ExpertFFN", "RoutedFFN", "RoutedLinear", "RoutedNorm"]
