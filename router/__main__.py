"""`python -m router`: the command `router`."""

from router.cli import main

main()
