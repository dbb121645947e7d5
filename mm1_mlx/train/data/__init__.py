"""Files of pictures and text -> examples in a fixed order -> batches."""
