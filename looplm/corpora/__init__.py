"""Corpora, their tokenizers and data modules."""
