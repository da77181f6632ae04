"""`python apps/train RECIPE` and `torchrun apps/train RECIPE`: see `app_train.cli`."""

from app_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
