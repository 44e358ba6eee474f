"""How a new generation is held to its parents."""
