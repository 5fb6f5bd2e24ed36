#!/usr/bin/env python3
"""Fine-tune the last blocks of a Vision Transformer on Oxford-IIIT Pet, or on your own folders of photos.

This is minivit/train.py, for a checkout that is not installed.
"""

from minivit.train import command, main

__all__ = ["main"]

if __name__ == "__main__":
    command()
