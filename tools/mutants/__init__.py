"""Planted faults, and the tests that must fail by each of them."""
