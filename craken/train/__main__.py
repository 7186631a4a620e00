"""Lets launchers start the training command: `deepspeed -m craken.train`, `torchrun -m craken.train`."""

import sys

from craken.train.command import main

if __name__ == "__main__":
    sys.exit(main())
