"""A block per process: chains of processes, boundary tensors on their way, one block of a model at work by itself."""
