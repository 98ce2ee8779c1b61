"""What a batch asks of a model: its labels, of any of the usual shapes, as one flat list of targets.

Losses are not known here.
"""
