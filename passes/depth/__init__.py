"""Rewrites that make a model less deep: whole blocks, parts of blocks, layers that share or run side by side."""
