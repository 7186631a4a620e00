"""Lets launchers start the training command: `deepspeed -m craken.train`, `torchrun -m craken.train`."""

import sys

from craken.stop import StopRequest

if __name__ == "__main__":
    with StopRequest().listening() as request:
        from craken.train.command import main  # takes seconds, in which a signal may come

        sys.exit(main(request=request))
