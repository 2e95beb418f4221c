"""The command `adaptrt` and `python -m adaptrt`: the command line, quiet under Ctrl-C from the first import on."""

import sys


def main() -> None:
    """Run the command line and exit."""
    try:
        from adaptrt.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
