"""From a job file to an output folder."""
