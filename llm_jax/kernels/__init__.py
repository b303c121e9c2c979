"""Fast paths, and the plain reference that each must match."""
