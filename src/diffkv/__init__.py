"""DiffKV: a KV cache that keeps each token in the precision that its attention head needs."""

__version__ = "0.1.0"
