"""Bring a model in, and the samples it is judged on."""
