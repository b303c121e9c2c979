"""From raw crawls, dumps and text files to a clean dataset of documents that tfds reads by name."""
