"""Be refused, push, and fail to push, on as many processes as `accelerate launch` starts.

Usage: pushing.py FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from sharing import make

from hf_blocklocal.errors import NotPushableError
from hf_blocklocal.hub import Patience


def main() -> None:
    """Leave word of each, by the number of the process; the last push ends the process with its error."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage, and need not look for it in all that has been imported
    try:
        make(folder / "refused", push_to_hub=True, hub_model_id="ann/run", hub_token="hf_wrong", use_cpu=True)
    except NotPushableError as error:
        refusal = str(error)
    trainer = make(folder / "run", push_to_hub=True, hub_model_id="ann/run", use_cpu=True)
    rank = trainer.args.process_index
    (folder / f"refusal-{rank}.txt").write_text(refusal)
    trainer.train()
    commit = trainer.push_to_hub()
    (folder / f"pushed-{rank}.json").write_text(json.dumps(commit is not None))
    trainer.push_patience = Patience(attempts=1)
    trainer.hub_model_id = "ann/late"
    trainer.push_to_hub()
    trainer.evaluate(trainer.train_dataset)  # where the other process waits for the one that has failed
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
