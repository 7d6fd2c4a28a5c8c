"""One small file per model family; see `base` for the vocabulary."""
