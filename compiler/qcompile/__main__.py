"""`python -m qcompile` is the command qcompile."""

from .cli import main

main()
