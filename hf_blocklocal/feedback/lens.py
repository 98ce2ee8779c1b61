"""A lens: what a head does to the output of its block before the model's own upper parts read it."""

# Shapes: B batch, S sequence, D hidden width.

from __future__ import annotations

from torch import Tensor, nn


class Lens(nn.Module):
    """A learned affine map, `h + A h + c`, that starts as the identity: A and c are 0.

    Upper layers expect what the layers right below them make. A lens translates: Belrose et al. (2023), Eliciting
    latent predictions from transformers with the tuned lens, arXiv 2303.08112. There it learns from the model's final
    predictions; here from the labels, with the block's own loss, because those predictions are not made yet where the
    block ends. With `head_warmup_steps` it learns alone at first.

    Args:
        hidden_width: Width D of the block's output.
    """

    citation = (
        "Belrose et al. (2023), Eliciting latent predictions from transformers with the tuned lens, arXiv 2303.08112"
    )

    def __init__(self, hidden_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_width, hidden_width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Translate a hidden state, (B, S, D), or (B, D, height, width) as convolutional nets have it."""
        rows = hidden.movedim(1, -1) if hidden.dim() == 4 else hidden
        change = self.linear(rows.to(self.linear.weight.dtype)).to(hidden.dtype)
        return hidden + (change.movedim(-1, 1) if hidden.dim() == 4 else change)
