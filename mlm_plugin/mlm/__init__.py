"""The method of arXiv 2410.10058: prompts, masks, contextualizer, targets, losses, regularizer.

Nothing here knows a trainer, a command line or the class of a text encoder. Reading order:
``regularizer``, ``encoder``, ``teacher``, ``losses``, ``contextualizer``, ``masking``, ``prompts``.

Shape suffixes: B prompts, L tokens, D width of the text encoder, W inner width of the
contextualizer, V vocabulary, N masked tokens.
"""
