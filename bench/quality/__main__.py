"""``python -m bench.quality [report]``: the same as ``python -m bench quality`` and
``quality-report``."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main())
