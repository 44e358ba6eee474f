"""Images of any kind to stamped vectors: parts, workers, actors, output."""
