"""The frozen layer, the adapter, the host that joins them, and the two laws between them."""
