#!/usr/bin/env python3
"""Name what is in photos, and draw where each block of the Vision Transformer looks.

This is minivit/infer.py, for a checkout that is not installed.
"""

from minivit.infer import command, main

__all__ = ["main"]

if __name__ == "__main__":
    command()
