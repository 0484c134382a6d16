"""Variants of one model as what differs from it: written, read, and the files rebuilt byte for byte.

Only the tensors that a variant changes are kept for it, as TAPS does for tasks (Wallingford et al., "Task Adaptive
Parameter Sharing for Multi-Task Learning", CVPR 2022).
"""
