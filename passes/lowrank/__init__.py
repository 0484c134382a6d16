"""Passes that write a layer as factors."""
