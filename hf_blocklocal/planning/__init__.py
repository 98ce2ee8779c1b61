"""What the parts of a model cost, where to cut it accordingly, and what each device then does and holds."""
