"""The tests, a package so that they can share `tests.awkward`, `tests.s3_server` and `tests.services`."""
