"""``python -m servingtiers.cli``: the command line without its script."""

from servingtiers.cli import main

main(prog_name="servingtiers")
