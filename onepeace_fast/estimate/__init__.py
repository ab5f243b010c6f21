"""``onepeace-fast estimate``: FLOPs, bytes, memory and time of a model that need not be built, by formulas."""
