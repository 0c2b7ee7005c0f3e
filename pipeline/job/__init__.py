"""Jobs: a job file is read and checked, and its rows run into an output folder."""
