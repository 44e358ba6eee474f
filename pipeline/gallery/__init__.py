"""What a gallery is searched by: indices, segments, their store, the hits."""
