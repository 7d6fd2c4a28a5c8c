"""Run time of Pixano Edge. Never imports torch, transformers or optimum."""

__version__ = "0.1.0"
