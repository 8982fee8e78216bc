"""`python -m jaxcompress` is the command line."""

from jaxcompress.cli import main

main()
