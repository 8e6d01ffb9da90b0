"""An example that is switched off, with its launcher, in the middle of a step.

python dying_example.py STEP NAME OPTIONS...
"""

import sys

from distilling import InTheMiddleOf, die
from examples_runner import load_example


def main():
    step, name, *options = sys.argv[1:]
    example = load_example(name)
    make = example.DistillationTrainer
    example.DistillationTrainer = lambda *given, **others: make(
        *given, **others, callbacks=[InTheMiddleOf(int(step), die)]
    )
    example.main(options)


if __name__ == "__main__":
    main()
