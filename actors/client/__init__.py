"""The side of a client: admission, routing and calls."""
