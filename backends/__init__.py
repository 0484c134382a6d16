"""Send a model out, and run it."""
