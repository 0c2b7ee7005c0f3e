"""The side of the supervisor: it places, restarts and scales replicas."""
