"""`python -m mgprune` is the command `mgprune`, for programs that start others by the name of a module."""
import sys

from mgprune.cli import main

if __name__ == "__main__": sys.exit(main())
