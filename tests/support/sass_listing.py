"""What nvdisasm prints of kernels, for tests of the counts of their instructions."""

import itertools

from tools.compile_cuda import CSRC


def line_of(name, text):
    """The number of the line of a source that has a text."""
    return next(number for number, line in enumerate((CSRC / name).read_text().splitlines(), 1) if text in line)


def listing(*chain):
    """What nvdisasm prints of one instruction's source lines, innermost first."""
    places = [f'File "{CSRC / name}", line {line_of(name, text)}' for name, text in chain]
    inlined = [f"{mine} inlined at {outer}" for mine, outer in itertools.pairwise(places)]
    return "".join(f"\t//## {line}\n" for line in [*inlined, places[-1]])
