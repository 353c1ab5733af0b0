"""What is seen of a run: progress, metrics, held-out loss, samples, the report page."""
