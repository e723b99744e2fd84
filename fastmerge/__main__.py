"""`python -m fastmerge` is the command line."""

from .cli import main

main()
