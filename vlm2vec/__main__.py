"""`python -m vlm2vec`, which launchers of several processes need."""

import sys

from vlm2vec.cli import main

sys.exit(main())
