"""Score a library on a Ray cluster.

ray job submit --working-dir . -- python jobs/score.py s3://bucket/photos --out s3://bucket/scores
"""

import sys

from picinspector.cli import entry_point

if __name__ == "__main__":
    sys.argv.insert(1, "score")
    entry_point()
