"""The command line: one Typer command a file, each parses, calls one library function, and prints."""
