"""``python -m d2scale`` is the ``d2scale`` command."""

import sys

from d2scale.cli import main

sys.exit(main())
