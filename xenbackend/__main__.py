"""`python -m xenbackend`: the same as the command `xenbackend`."""

import sys

from xenbackend.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
