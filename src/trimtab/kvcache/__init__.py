"""The KV-cache seam: what is remembered of past tokens, where, and in how many bits. One file a policy."""
