"""A model and its adapters: which modules, where they stand, merging; and loading a base."""
