"""Multi-turn LLM traces: read them, generate them, scale them down, and turn them into tokens."""

from .generator import generate
from .readers import read, read_agentic, read_mooncake
from .scaling import scale
from .session import Link, Session, Statistics, Turn, statistics
from .synthesis import Conversation, tokens

__all__ = [
    "Conversation",
    "Link",
    "Session",
    "Statistics",
    "Turn",
    "generate",
    "read",
    "read_agentic",
    "read_mooncake",
    "scale",
    "statistics",
    "tokens",
]
