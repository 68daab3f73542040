"""Scores of trials: error rates, their uncertainty, and calibration. Nothing here needs a network or JAX.

Read `metrics` first (EER, minDCF), then `trials` (lists), `confidence` (bootstrap), `calibration`, and `score`, the
command. `embedding_file` reads and writes embeddings, `clusters` merges groups of utterances, and `figures` draws.
"""
