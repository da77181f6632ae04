"""What stops a run for a reason the user can mend: one sentence each, no traceback."""


class RunError(ValueError):
    """A setting, a folder or a checkpoint that cannot be used; the message names it and the remedy."""


class Interrupted(SystemExit):
    """The run saved its state after SIGTERM (exit status 143) or Ctrl-C (130); the same command goes on from there."""


class NonFiniteGradient(RunError):
    """The gradient norm was not finite: the run stopped before the optimizer step."""
