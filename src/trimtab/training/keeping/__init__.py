"""Nothing lost: the run's folder, checkpoints, resuming, what is kept of a failure."""
