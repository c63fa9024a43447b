"""Texts and models by name: sources, sequences of token ids, texts that the target writes."""
