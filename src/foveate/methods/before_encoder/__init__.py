"""Methods that choose among the pixels, before the vision encoder."""
