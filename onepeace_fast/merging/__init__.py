"""Weights of several models averaged into one (UnIVAL, arXiv 2307.16184, section 5; model soups, arXiv 2203.05482)."""

from onepeace_fast.merging.merge import interpolate, merge

__all__ = ["interpolate", "merge"]
