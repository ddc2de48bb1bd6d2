"""`accelerate launch train.py RECIPE [--tiny] [--dry-run] [key=value ...]`: the same as `vlm2vec train`."""

import sys

from vlm2vec.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
