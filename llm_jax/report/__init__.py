"""A run as others see it: its record read as a whole, thinned, drawn, and made into a page."""
