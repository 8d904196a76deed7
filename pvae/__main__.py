"""``python -m pvae`` is the command line."""

import sys

from pvae.cli import main

if __name__ == "__main__":
    sys.exit(main())
