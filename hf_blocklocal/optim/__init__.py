"""What becomes of the gradients of a block: averaged over processes, scaled, clipped, stepped, always by itself."""
