"""Tests of ffdist: `python3 -m tests` runs all of them, `python3 -m tests --help` tells more."""
