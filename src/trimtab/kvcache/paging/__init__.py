"""Memory of the cache policies: one bounded arena cut into pages, and the index that finds shared prefixes."""
