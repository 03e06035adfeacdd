"""``python -m mergekit_arm``: the same as the ``mergekit-arm`` command."""

from mergekit_arm.cli.main import main

if __name__ == "__main__":
    main()
