"""`serve`: a page on which to drop a photo, with the names and the explorer for it."""
