"""`python apps/eval COMMAND`: see `app_eval.cli`."""

from app_eval.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
