"""MeMo in JAX: speaker verification learned without labels."""

__version__ = "0.1.0"
