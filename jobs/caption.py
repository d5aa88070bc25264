"""Describe photos that are scored already, on a Ray cluster.

ray job submit --working-dir . -- python jobs/caption.py s3://bucket/scores --best 500
"""

import sys

from picinspector.cli import entry_point

if __name__ == "__main__":
    sys.argv.insert(1, "caption")
    entry_point()
