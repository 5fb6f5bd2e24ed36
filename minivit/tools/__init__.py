"""The commands of `python -m minivit` besides train and infer, which no other room imports."""
