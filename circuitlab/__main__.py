"""``python -m circuitlab`` is the command line."""

from circuitlab.cli import main

if __name__ == "__main__":
    main()
