#!/usr/bin/env python3
"""Fine-tune the last blocks of a Vision Transformer on Oxford-IIIT Pet, or on your own photos.

The training job is minivit/train.py: the epoch loop can be read there, and one optimizer step in
minivit/training/step.py. The flags are in minivit/commands.py.
"""

from minivit.commands import train as main
from minivit.commands import train_script

__all__ = ["main"]

if __name__ == "__main__":
    train_script()
