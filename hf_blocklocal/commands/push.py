"""Push the folder of a run to the Hub, for example one that a failed push has left behind.

hf-blocklocal push runs/quickstart user/docstrings
hf-blocklocal push runs/quickstart user/docstrings --private --revision first-try

The token is that of `hf auth login` or HF_TOKEN. What is sent: model, tokenizer, block_local_config.json, heads, card,
history and figures, whatever the folder holds; no checkpoints, no pickles.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Check, push, and print where it is."""
    parser = argparse.ArgumentParser(
        "hf-blocklocal push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="folder that save_model() has written: output_dir, or a checkpoint")
    parser.add_argument("repo", help="repository, with or without the namespace; made if need be")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--token", help="token that may write (better: hf auth login, or HF_TOKEN)")
    parser.add_argument("--revision", help="branch, made if need be (default: main)")
    parser.add_argument("--attempts", type=int, default=6, help="how often to try (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which to give up (default: 300)")
    options = parser.parse_args(argv)

    from hf_blocklocal.errors import BlockLocalError
    from hf_blocklocal.hub import Destination, Patience, push_run

    destination = Destination(options.repo, options.token, options.private, options.revision)
    try:
        patience = Patience(attempts=options.attempts, limit=options.limit)
        commit = push_run(options.run_dir, destination, message="Push a run", patience=patience)
    except BlockLocalError as error:
        raise SystemExit(f"hf-blocklocal push: {error}") from None
    print(f"{options.run_dir} is on the Hub: {commit.commit_url}")
