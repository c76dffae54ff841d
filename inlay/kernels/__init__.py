"""Fast ways to compute what the plain ones mean, each with its eager twin."""
