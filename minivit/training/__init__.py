"""Training: one optimizer step, the frozen blocks' features, a run's state and its results."""
