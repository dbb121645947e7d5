"""A folder of pictures into a caption, or an object, for each of them."""
