"""What a head borrows from the layers above its block: the way through them, copies of them, loans that it trains."""
