"""``python -m securetune``: the same as the command ``securetune``."""

from securetune.cli.app import main

if __name__ == "__main__":
    main()
