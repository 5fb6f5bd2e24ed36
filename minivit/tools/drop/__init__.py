"""Drop: leave tokens of the pet or of the background out, and see whether the answer stays."""
