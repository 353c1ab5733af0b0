"""Fused operators for training on the CPU, each with its gradient and a plain-torch fallback."""
