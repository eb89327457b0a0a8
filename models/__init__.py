"""Models built from the layer."""
