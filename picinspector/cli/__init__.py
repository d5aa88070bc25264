"""The command line: parses, calls one function of the library, prints. stdout is the result, stderr everything else.

Exit codes: 0 done, 1 crashed, 2 wrong usage, 3 done but transient failures remain, 4 `diff --fail-over`: scores
drifted, 130 interrupted. `verify` gives 1 where the tables are broken.
"""

from __future__ import annotations

import os
import re
import sys

import typer

import picinspector
from picinspector import errors, logs
from picinspector.cli import curating, jobs, looking, models, serving
from picinspector.cli.words import complain
from picinspector.errors import PicInspectorError

_INTERRUPTED = 130
#: Ray Data appends to what a stage raised how often it was tried, and which of its settings to change.
_RAYS_ADVICE = re.compile(r"\nFailed to .* after \d+/\d+ attempts.*", re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    debug = bool(os.environ.get("PICINSPECTOR_DEBUG"))
    logs.configure()
    try:
        result = app(args=arguments, prog_name="picinspector", standalone_mode=False)
        if result == _INTERRUPTED:  # how Typer reports Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return complain("interrupted; nothing is lost: run the same command again", _INTERRUPTED)
    except PicInspectorError as error:
        # Ray wraps what a worker raised in a subclass whose text is a traceback; the cause has the one line.
        cause = getattr(error, "cause", error)
        return complain(_one_line(cause), cause.exit_code)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own: usage, abort
            error.show()
            return int(error.exit_code)
        if debug:
            raise
        cause = getattr(error, "cause", None) or error
        reason = (_RAYS_ADVICE.sub("", str(cause)).strip().splitlines() or [""])[-1]
        # An actor that died while starting leaves nothing but its traceback's text.
        if found := re.match(r"picinspector\.errors\.(\w+): (.*)", reason):
            return complain(found[2], int(getattr(errors, found[1]).exit_code))
        return complain(f"{type(cause).__name__}: {reason} (PICINSPECTOR_DEBUG=1 shows where)", 1)


def _one_line(error: BaseException) -> str:
    return _RAYS_ADVICE.sub("", str(error)).partition("\n")[0]


def entry_point() -> None:
    """The `picinspector` command."""
    code = main()
    if code == _INTERRUPTED:
        # Ray Data's threads are in the middle of something; taking Python down around them was seen to crash (SIGSEGV).
        # A local Ray ends by itself when its driver is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def version() -> int:
    """Print the version."""
    print(picinspector.__version__)
    return 0


app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Score a bucket of photos: quality, attributes and scenes as Parquet tables.",
)  # fmt: skip
for command in (
    jobs.score,
    jobs.nightly,
    jobs.rescore,
    jobs.caption,
    jobs.prune,
    curating.top,
    curating.bottom,
    curating.groups,
    curating.select,
    curating.search,
    curating.report,
    curating.curate,
    looking.diff,
    looking.verify,
    looking.inspect,
    looking.critique,
    serving.serve,
    version,
):
    app.command()(command)
app.add_typer(models.bundle_app, name="bundle")
app.add_typer(models.train_app, name="train")
