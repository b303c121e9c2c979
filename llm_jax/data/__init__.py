"""From tfds documents to batches."""
