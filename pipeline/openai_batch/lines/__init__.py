"""One line of a batch file: the fields of its body, the request that it holds, and the line that answers it."""
