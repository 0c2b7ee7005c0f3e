"""One line of a batch file: its body, its request, its answer."""
