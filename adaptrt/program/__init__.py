"""The Program: the closed set of operations a backend must run, as a flat list (spec/program.md)."""

from adaptrt.program.ops import (
    Add,
    Attention,
    Embed,
    Gated,
    Linear,
    Logits,
    Norm,
    Op,
    Program,
    Rope,
    Scale,
)

__all__ = ["Add", "Attention", "Embed", "Gated", "Linear", "Logits", "Norm", "Op", "Program", "Rope", "Scale"]
