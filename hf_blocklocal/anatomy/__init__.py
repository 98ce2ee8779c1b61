"""What there is to know of any model: where its layers are, what they are given and return, which weights it ties.

Whatever depends on how transformers builds its models is here, and nothing of how a model is cut.
"""
