"""Settings for the comparisons with PyTorch: each program runs once, so quick compilation matters more than speed."""

import os

import jax
import torch

# The settings in tests/conftest.py slow down programs that are compiled for minutes of speech (test_pretrained.py).
os.environ.setdefault("XLA_FLAGS", "")

jax.config.update("jax_disable_most_optimizations", True)
torch.set_num_threads(1)
