"""`python -m sage_inductor`."""

import sys

from sage_inductor.cli import main

if __name__ == "__main__":
    sys.exit(main())
