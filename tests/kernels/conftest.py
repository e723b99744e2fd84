"""Decides where the value tests run: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton reads the variable when it is imported, so those tests need a process of their own:
# test_values.py starts it.
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["values"]
