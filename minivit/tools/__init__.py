"""Tools: the commands of `python -m minivit` besides train and infer. Nothing else imports them."""
