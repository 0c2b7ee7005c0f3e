"""Files of jobs: storage, its file system for Arrow, and the logs of Delta tables."""
