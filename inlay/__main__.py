"""`python -m inlay` is the command `inlay`."""

import sys

from inlay.cli import main

sys.exit(main())
