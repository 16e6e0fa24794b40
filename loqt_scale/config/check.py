"""The one way in which a setting is refused."""


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message), which names the key and what to write instead, unless the condition holds."""
    if not condition:
        raise ValueError(message)
