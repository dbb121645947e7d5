"""An OpenAI-compatible HTTP server around a ``Runtime``; ``apps/serve.py`` is its command."""
