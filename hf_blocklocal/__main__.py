"""`python -m hf_blocklocal` is `hf-blocklocal`."""

from __future__ import annotations

from hf_blocklocal.commands import main


if __name__ == "__main__":
    main()
