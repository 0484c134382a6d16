"""Rewrites that preserve the function of the model."""
