"""The version of G2L."""

__version__ = "0.2.0.dev0"
