"""Group the scored photos of a destination, choose those worth keeping, write the report; on a node of a Ray cluster.

ray job submit --entrypoint-num-cpus 2 --working-dir . -- python jobs/curate.py s3://bucket/scores --best 500 \
    -o s3://bucket/report.html

It is one process: `--entrypoint-num-cpus` places it on a node that works, rather than on the head, and
`--entrypoint-memory` on one with enough memory.
"""

import sys

from picinspector.cli import entry_point

if __name__ == "__main__":
    sys.argv.insert(1, "curate")
    entry_point()
