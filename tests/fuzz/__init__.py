"""Anything as an argument: `python tests/fuzz --help`, or `nox -s fuzz`."""
