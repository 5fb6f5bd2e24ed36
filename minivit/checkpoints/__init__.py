"""Checkpoints: find or download them, read them into the model, and write them back."""
