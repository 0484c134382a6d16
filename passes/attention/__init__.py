"""Passes that replace attention."""
