"""Made-up data in the shape of MMEB, for tests and trials: every set in its real layout, small or as large as the real ones."""

from __future__ import annotations

from vlm2vec.data.made.archives import write_archives
from vlm2vec.data.made.write import write_b3, write_made

__all__ = ["write_archives", "write_b3", "write_made"]
