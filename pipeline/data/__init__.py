"""Images to batches: sources, shards, order, loader."""
