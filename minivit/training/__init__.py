"""Training: one optimizer step, the frozen blocks' features, the state of a run and what it leaves behind."""
