"""`python -m dataflex`."""

from dataflex.commands.app import main

main()
