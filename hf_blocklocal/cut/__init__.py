"""The cut of a model into blocks: spans of layers, the hooks that stop gradients between them, and what crosses.

How a block learns is not known here.
"""
