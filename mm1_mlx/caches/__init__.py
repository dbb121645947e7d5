"""Key-value caches that mlx-lm lacks, in its protocol."""
