"""Where rows end: results and dead letters, durable one by one, published in one go."""
