"""Plan which device gets which layers of a model: `hf-blocklocal plan`, which --help explains, as a script."""

from __future__ import annotations

from hf_blocklocal.commands.plan import main


if __name__ == "__main__":
    main()
