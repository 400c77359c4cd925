"""``python -m looplm``."""

import sys

from looplm.cli import main

if __name__ == "__main__":
    sys.exit(main())
