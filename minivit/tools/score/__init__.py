"""The command `score`: how much of a model's attention falls on the pet."""
