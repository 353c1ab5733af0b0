"""What several calibrations share: their texts, one look at keys and values, clustering."""
