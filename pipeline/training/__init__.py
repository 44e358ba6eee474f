"""One training run: engine, step, loop, checkpoint. Imports neither Ray, DALI nor MLflow."""
