"""All benchmarks of the project, each against its peers in one process.

    python benchmarks/run.py [--only caption rerank ...] [--runs 5] [--quick] [--clock cpu] [--json FILE]
    make bench

Prints for every line how much less time and memory ours takes than the peer (`paired.Row` says what the columns are).
docs/performance.md holds what was measured and what it means.
"""

import attention
import blip
import blip2
import blip3
import capfilt
import packed
import start
from paired import main

ROWS = {
    **start.ROWS,
    **blip.ROWS,
    **blip2.ROWS,
    **blip3.ROWS,
    **capfilt.ROWS,
    **packed.ROWS,
    **attention.ROWS,
}

if __name__ == "__main__":
    main(__doc__, ROWS)
