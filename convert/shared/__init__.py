"""What several formats share: config sections read strictly, and layouts."""
