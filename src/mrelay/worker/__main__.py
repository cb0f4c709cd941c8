"""`python -m mrelay.worker`: see worker.main."""

from mrelay.worker.main import main

if __name__ == "__main__":
    main()
