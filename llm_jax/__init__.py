"""Pretraining of language models in JAX: from raw text to a measured perplexity, without losing a run."""

__version__ = "0.1.0"
