"""What ranks do together: shards, sums, connections, and how the ranks find each other."""
