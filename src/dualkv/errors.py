"""The one exception dualkv raises."""


class Error(RuntimeError):
    """What went wrong, with which values, what the system said, and the likely cure.

    ``code`` is one of ``invalid_argument``, ``not_found``, ``corrupt``, ``io``, ``no_space``, ``timeout``,
    ``cancelled``, ``peer_lost``, ``refused``, ``unsupported``; ``os_errno`` is 0 or what the kernel returned.
    """

    def __init__(self, message: str, code: str, os_errno: int = 0) -> None:
        suffix = f" (errno {os_errno})" if os_errno else ""
        super().__init__(f"{code}: {message}{suffix}")
        self.message = message
        self.code = code
        self.os_errno = os_errno


def invalid(message: str) -> Error:
    """The Error for values that can't be served."""
    return Error(message, "invalid_argument")
