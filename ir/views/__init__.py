"""Typed windows on parts of a model that hide how an exporter spelled them, and write back through the same spelling."""
