"""What becomes of the gradients of a block, always by itself: averaged, scaled, clipped, stepped at its own rate."""
