"""Visual tokens are merged or dropped between the blocks of the vision encoder."""
