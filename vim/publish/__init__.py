"""Publishes finished runs on the Hugging Face hub, with a model card."""

from .config import PushConfig
from .hub import push_to_hub

__all__ = ["PushConfig", "push_to_hub"]
