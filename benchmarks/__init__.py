"""Benchmarks of securetune: ``python -m benchmarks [NAME ...]``.

This file exists because another installed distribution (opacus) ships a top-level package called
``benchmarks``: without it the installed one would win over this folder.
"""
