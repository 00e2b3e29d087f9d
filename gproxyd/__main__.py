"""`python -m gproxyd`."""

import sys

from gproxyd.cli import main

sys.exit(main())
