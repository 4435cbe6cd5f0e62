"""``python -m jaxsp``: the command line."""

from jaxsp.cli import main

main()
