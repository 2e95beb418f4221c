"""Quantized number formats in numpy: the truth that the kernels are tested against."""
