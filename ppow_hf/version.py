"""The package's version, for every module that records it."""

__version__ = "0.1.0"
