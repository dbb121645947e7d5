"""The ``mm1`` command: one module per verb."""
