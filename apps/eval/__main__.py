"""`python apps/eval COMMAND`: the same as `hier COMMAND`; see `app_train.cli`."""

from app_train.cli import hier

if __name__ == "__main__":
    raise SystemExit(hier())
