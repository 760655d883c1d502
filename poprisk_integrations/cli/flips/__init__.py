"""Parts of `poprisk flips`: pairs whose label is probably wrong, and data without them."""
