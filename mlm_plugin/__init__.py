"""Masked-language-model regularizer for Stable Diffusion personalisation (arXiv 2410.10058)."""

__version__ = "0.1.0"
