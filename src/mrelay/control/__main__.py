"""`python -m mrelay.control`: started by the supervisor; see control.main."""

import sys

from mrelay.control.main import main

if __name__ == "__main__":
    sys.exit(main())
