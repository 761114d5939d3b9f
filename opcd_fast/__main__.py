"""`python -m opcd_fast` is `opcd`."""

import sys

from opcd_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
