"""The lessons of MM1 (arXiv 2403.09611), section 3, taught to models of half a million weights."""
