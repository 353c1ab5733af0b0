"""The page of a training run: curves, settings, data, samples."""
