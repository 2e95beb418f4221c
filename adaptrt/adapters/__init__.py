"""Adapters: the normal form every variant lowers to, the Variant base class, and stacking."""
