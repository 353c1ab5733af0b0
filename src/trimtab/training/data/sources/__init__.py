"""Sources: endless, resumable streams of segments, one file a kind."""
