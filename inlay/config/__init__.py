"""The configuration of a run: one schema, its files and words, and where each value came from.

A recipe (recipe.py), command line words (words.py) and Python (given.py) each give a list of
`Given`; resolve.py brings them to one `RunConfig` (schema.py) and the origin of every value, and
dump.py writes both to the config.yaml of the run folder.
"""
