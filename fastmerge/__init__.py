"""Merge fine-tuned models: a merged weight is a thing you compute with, not a thing you build."""

__version__ = "0.1.0"
