"""MeMo in JAX: speaker verification learned without labels."""

from memo_jax.version import __version__

__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> type:
    if name == "Embedder":  # imported when asked for: it imports JAX, which `memo-jax --help` must not wait for
        from memo_jax.inference.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
