"""Claims: one file per paper, its central claim in miniature, run for real."""
