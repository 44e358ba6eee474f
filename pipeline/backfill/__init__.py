"""A gallery moved to a newer generation: the order, the moves, the curve so far."""
