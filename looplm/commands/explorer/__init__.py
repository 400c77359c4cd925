"""The parts of ``explore``: what is opened, what is computed, how it is served, and the page."""
