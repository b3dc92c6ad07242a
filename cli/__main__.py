"""`python -m pocketfed.cli`: the same command where scripts are not on the path."""

from pocketfed.cli.main import main

main()
