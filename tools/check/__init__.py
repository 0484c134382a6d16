"""Regression of exported models: what a model is, as a small text file, and what changed since."""
