"""`python -m mrelay`: the command line."""

from mrelay.cli import main

if __name__ == "__main__":
    main()
