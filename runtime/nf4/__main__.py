"""`python -m nf4` is the command nf4."""

from .cli import main

if __name__ == "__main__":
    main()
