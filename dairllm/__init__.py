"""dairllm: run a language model larger than the memory of the machines at hand."""

__all__ = ["__version__"]

__version__ = "0.1.0"
