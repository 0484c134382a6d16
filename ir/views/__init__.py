"""Typed windows on parts of a model: they hide how an exporter spelled them, and write through the same spelling."""
