"""The side of a replica: an actor, its engine thread and its ranks."""
