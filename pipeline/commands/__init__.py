"""The commands of the command line: one file, one command."""
