"""Decoding step by step with caches: what a decoder needs at each call, and the loops that use it.

A `Decoder` is a model with its ports and an engine that runs it; `decoder.start(rows)` gives a `State`, which holds the
caches of a batch. Every loop (plain, speculative, with prefixes that are used again) is written with five operations
of a state: `feed`, `truncate`, `select`, `fork` and `lengths`.
"""
