"""Find what stands for an input token in a model and what for a target, and how many tokens it knows."""

from __future__ import annotations

from torch import Tensor, nn


def target_embedding(model: nn.Module) -> Tensor:
    """Return the matrix whose row y stands for the token y: the language-model head, else the input embedding.

    Returns:
        The live weight, (V, E): vocabulary by embedding width. Read-only for the heads.
    """
    output = model.get_output_embeddings()
    return (output if output is not None else model.get_input_embeddings()).weight


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that turns token ids into vectors, None for models of images and sound."""
    if not hasattr(model, "get_input_embeddings"):  # no model of transformers
        return None
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the language-model head, None for models without one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of tokens a language-model head chooses from, None for models without one."""
    output = output_embedding(model)
    return None if output is None else output.weight.shape[0]
