r"""Keep a library's tables fresh, night after night.

ray job submit --submission-id "picinspector-nightly-$(date -u +%F)" --working-dir . -- \
  python jobs/nightly.py s3://bucket/photos --out s3://bucket/scores
"""

import sys

from picinspector.cli import entry_point

if __name__ == "__main__":
    sys.argv.insert(1, "nightly")
    entry_point()
