"""Memory of the cache policies: one bounded arena cut into pages, and the index of shared prefixes."""
