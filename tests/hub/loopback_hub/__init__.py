"""A Hub in this process, over HTTP on loopback, for the real client of huggingface_hub."""

from loopback_hub.server import Fault, LoopbackHub


__all__ = ["Fault", "LoopbackHub"]
