"""Score stored embeddings again with another scorer, on a Ray cluster; reads no photo.

ray job submit --working-dir . -- python jobs/rescore.py s3://bucket/scores --bundle /shared/bundles/new
"""

import sys

from picinspector.cli import entry_point

if __name__ == "__main__":
    sys.argv.insert(1, "rescore")
    entry_point()
