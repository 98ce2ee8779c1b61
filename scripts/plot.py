"""Draw a run from its history.jsonl: `hf-blocklocal plot`, which --help explains, as a script."""

from __future__ import annotations

from hf_blocklocal.commands.plot import main


if __name__ == "__main__":
    main()
