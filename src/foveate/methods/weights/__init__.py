"""Methods that replace weights by whole numbers."""
