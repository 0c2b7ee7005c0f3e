"""The commands of the command line: one file, one command. `running.py` is what those that run a job share."""
