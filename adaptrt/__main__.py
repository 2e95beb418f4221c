"""`python -m adaptrt` is the command line."""

from adaptrt.cli import main

main()
