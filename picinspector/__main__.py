"""`python -m picinspector`: the same as the `picinspector` command."""

from picinspector.cli import entry_point

entry_point()
