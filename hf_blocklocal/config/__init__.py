"""How a model is to be cut and taught: fields, what excludes what, and what they leave to the model.

Touches no weight. `refusals` looks at the arguments of `transformers` beside them.
"""
