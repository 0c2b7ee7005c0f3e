"""Writes the output of a job: results and dead letters become durable row by row, and are published all at once."""
