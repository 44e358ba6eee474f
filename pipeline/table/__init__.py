"""The paper's tables, and the later methods beside them: a grid of generations, measured and written down."""
