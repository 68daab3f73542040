"""Settings of the comparisons with PyTorch: each program runs once, so quick compilation is worth more than speed."""

import os

import jax
import torch

# What tests/conftest.py would set makes programs slow that are compiled for minutes of speech (test_pretrained.py).
os.environ.setdefault("XLA_FLAGS", "")

jax.config.update("jax_disable_most_optimizations", True)
torch.set_num_threads(1)
