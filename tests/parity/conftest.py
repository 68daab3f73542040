"""Settings of the comparisons with PyTorch: each program runs once, so quick compilation is worth more than speed."""

import jax
import torch

jax.config.update("jax_disable_most_optimizations", True)
torch.set_num_threads(1)
