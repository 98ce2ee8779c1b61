"""What is measured, and how it is kept: losses, memory, operations, rows of a history."""
