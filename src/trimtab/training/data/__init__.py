"""Where training examples come from: readers, token stores, sources, mixtures, batches."""
