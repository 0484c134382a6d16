"""Passes on the keys and values that attention keeps."""
