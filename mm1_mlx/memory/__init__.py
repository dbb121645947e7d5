"""What is kept so that nothing is computed twice."""
