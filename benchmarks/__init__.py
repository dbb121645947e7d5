"""Measurements of mm1_mlx; run from a checkout, not installed."""
