"""Find or download checkpoints, load them into the model, and save them."""
