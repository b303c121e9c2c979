"""One file per verb; each reads top to bottom like a table of contents."""
