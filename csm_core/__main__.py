"""``python -m csm_core`` is ``csm``, also where the package is not installed."""

import sys

from csm_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
