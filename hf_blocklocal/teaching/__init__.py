"""One local step: what stands at the ends of blocks, the loss of each, and the backward pass that goes no further."""
