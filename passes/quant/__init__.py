"""Rewrites that store and multiply numbers of fewer bits."""
