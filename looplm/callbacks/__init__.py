"""Lightning callbacks that plug into any project."""
