"""The version of this package; setup.cfg has the same."""

__version__ = "0.2.0"
