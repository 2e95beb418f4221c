"""Backends run a Program: `reference` (numpy, slow and obvious) and `cpu` (native)."""
