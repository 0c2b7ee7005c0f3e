"""Pooling in a processor and a job: the tasks, the texts of a pair, the vectors, and the columns of an answer."""
