"""The commands of the command line, one per file. `running.py` holds the code of the commands that run a job."""
