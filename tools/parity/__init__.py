"""Recordings of public implementations, run through this library: ``python -m tools.parity FILE...``"""
