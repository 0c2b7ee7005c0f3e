"""Several ranks: shards, sums over ranks, connections between them, and how the ranks find each other."""
