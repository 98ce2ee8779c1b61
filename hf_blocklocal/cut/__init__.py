"""The cut of a model into blocks: spans of layers, the hooks that stop gradients between them, and what crosses.

What a block learns from is not known here.
"""
