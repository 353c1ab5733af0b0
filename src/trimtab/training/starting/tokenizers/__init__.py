"""Tokenizers: training one on texts, and giving a model another one."""
