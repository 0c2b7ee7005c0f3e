"""The stages of backends: each sends a row to an engine, an HTTP endpoint or a deployment, and waits for the answer."""
