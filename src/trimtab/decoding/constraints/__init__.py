"""Constraints: which tokens may come next, so that the text has the form that was asked for."""
