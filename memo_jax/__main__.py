"""`python -m memo_jax` is the command `memo-jax`."""

from memo_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
