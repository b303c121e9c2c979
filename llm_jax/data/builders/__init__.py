"""Builders of tfds datasets of documents."""
