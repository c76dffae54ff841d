"""A run: from settings to a trained adapter, and the folder that holds all of it.

training.py reads from top to bottom; it is the only place where settings become objects.
"""

from inlay.run.folder import Run
from inlay.run.training import start, train

__all__ = ["Run", "start", "train"]
