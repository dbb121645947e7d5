"""Training on pictures and text with the very model that serves."""
