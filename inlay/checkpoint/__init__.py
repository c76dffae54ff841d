"""Files on disk: adapters, training checkpoints, and the one way to write either whole."""
