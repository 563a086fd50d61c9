"""Data: sources, validation, exact de-duplication, keyed-hash splits, tokenisation and batches."""
