"""Data: data sets and their splits, photos, preprocessing, and the store of decoded photos."""
