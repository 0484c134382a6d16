"""Rewrites of a model, and the engine that runs and proves them. The folder is the registry: a file is a pass."""
