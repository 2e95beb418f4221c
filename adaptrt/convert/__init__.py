"""Importers: one file per foreign format. A Hugging Face folder or a PEFT folder becomes an `.adrt` file."""

from adaptrt.convert.base import ConvertOptions, Importer, Progress

__all__ = ["ConvertOptions", "Importer", "Progress"]
