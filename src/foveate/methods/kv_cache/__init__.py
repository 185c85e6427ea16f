"""Keys and values are evicted from the cache."""
