"""`python -m tools.rehearsal [--short] [--versions NAME] [FILES]`: see `tools/rehearsal/__init__.py`."""

import argparse
import sys

from tools.rehearsal import run, versions
from tools.scratch import use_scratch


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 bootstrap.py rehearse", description=run.__doc__)
    parser.add_argument("--short", action="store_true", help="less of it, in a few minutes")
    parser.add_argument("--versions", choices=versions.VERSIONS, help="in an environment with these versions")
    parser.add_argument("files", nargs="*", help="files of tests, instead of all that need a GPU")
    options = parser.parse_args(arguments)
    use_scratch()
    if options.versions:
        return versions.main(options.versions, options.short)
    return run.main(options.short, options.files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
