"""What is made of a client's request. Pure functions."""

from typing import Any

_NOT_FOR_PREFILL = ("stream_options", "logprobs", "top_logprobs", "echo", "stop", "min_tokens", "response_format")


def prompt_size(body: dict[str, Any]) -> int:
    """Characters or tokens of the prompt: a measure of load, not more."""
    if "messages" in body:
        return sum(len(str(message.get("content", ""))) for message in body["messages"] if isinstance(message, dict))
    prompt = body.get("prompt", "")
    return len(prompt) if isinstance(prompt, str | list) else 0


def can_be_split(body: dict[str, Any]) -> bool:
    """Whether one server can prefill and another decode: one prompt, whose prefix may be taken from storage."""
    prompt = body.get("prompt", "")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return not several and body.get("prompt_logprobs") is None and not body.get("use_beam_search")


def for_prefill(body: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """The same prompt, for one token that nobody sees."""
    out = {name: value for name, value in body.items() if name not in _NOT_FOR_PREFILL}
    out.update(max_tokens=1, stream=False, n=1, kv_transfer_params=params)
    if "max_completion_tokens" in out:
        out["max_completion_tokens"] = 1
    return out


def for_decode(body: dict[str, Any], params: dict[str, Any] | None) -> dict[str, Any]:
    """The client's request, with what the prefill server said of the hand-over."""
    out = {name: value for name, value in body.items() if name != "kv_transfer_params"}
    if params:
        out["kv_transfer_params"] = params
    return out


def prefilled(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The prefill server's word on the hand-over; None if it failed to make one."""
    choices = answer.get("choices") or [{}]
    if choices[0].get("finish_reason") == "error":
        return None
    params = answer.get("kv_transfer_params")
    return params if isinstance(params, dict) else None
