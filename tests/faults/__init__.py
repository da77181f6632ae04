"""What happens to a run when something goes wrong at the worst moment: `python tests/faults --help`, or `nox -s faults`.

A warm parent imports everything once and forks a child for each command, so that a command costs what it computes.
"""
