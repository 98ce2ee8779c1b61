"""Push the folder of a run to the Hub: `hf-blocklocal push`, which --help explains, as a script."""

from __future__ import annotations

from hf_blocklocal.commands.push import main


if __name__ == "__main__":
    main()
