"""What is measured while a model trains, and how it is kept: losses, memory, operations, rows of a history."""
