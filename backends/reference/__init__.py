"""Run models in float64 with NumPy: the judge of every exact rewrite."""
