"""Optimisers: AdamW for vectors and tables, Muon for the matrices between hidden states."""
