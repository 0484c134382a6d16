"""Passes that replace normalizations."""
