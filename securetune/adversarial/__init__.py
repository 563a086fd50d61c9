"""Attacks on embeddings and on text, and which adversarial objectives may be combined with privacy."""
