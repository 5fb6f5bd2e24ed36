#!/usr/bin/env python3
"""Name what is in photos, and draw where each block of the Vision Transformer looks.

The job is minivit/infer.py; how a model's attention becomes a map is in minivit/attention.py. The
flags are in minivit/commands.py.
"""

from minivit.commands import infer as main
from minivit.commands import infer_script

__all__ = ["main"]

if __name__ == "__main__":
    infer_script()
