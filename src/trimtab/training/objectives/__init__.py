"""Objectives: what a training step minimises, one file each."""
