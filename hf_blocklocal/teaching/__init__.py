"""One local step: what stands at the ends of blocks, their losses, and what changes in the course of a run."""
