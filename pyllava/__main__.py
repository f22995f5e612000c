"""``python -m pyllava`` is ``pyllava-cli``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
