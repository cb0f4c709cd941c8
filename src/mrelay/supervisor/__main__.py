"""`python -m mrelay.supervisor`: see supervisor.main."""

import sys

from mrelay.supervisor.main import main

if __name__ == "__main__":
    sys.exit(main())
