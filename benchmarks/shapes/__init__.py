"""A procedural benchmark: pictures of coloured shapes, with questions and captions."""
