"""The command `selfcheck`: numerical checks of attention and training on the user's device."""
