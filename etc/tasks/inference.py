"""Asks a language model over HTTP: OpenAI's chat completions, or Ollama's generate.

The operator sets address and protocol in the service's file. A job supplies the prompt, a model from the
service's list, and two numbers.
"""

import json
import urllib.error
import urllib.request
from typing import Annotated, Any, Literal

from msgspec import Meta

from aitbc_miner.task import TaskError

MAX_REPLY = 8 << 20
TIMEOUT_S = 600.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow no redirect: the operator's server must answer itself."""
        return


def run(
    endpoint: str,
    prompt: str,
    model: str,
    protocol: Literal["ollama", "openai"] = "ollama",
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024,
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.7,
) -> dict[str, Any]:
    """Ask once and wait for the whole answer; return the text, the model's name and the number of tokens."""
    if protocol == "openai":
        said = _post(
            f"{endpoint.rstrip('/')}/v1/chat/completions",
            {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_tokens,
                "temperature": temperature,
            },
        )
        choice = _first(said.get("choices"))
        text = _object(choice.get("message")).get("content")
        usage = _object(said.get("usage"))
        tokens = {
            "prompt_tokens": usage.get("prompt_tokens"),
            "output_tokens": usage.get("completion_tokens"),
        }
    else:
        options = {"num_predict": max_tokens, "temperature": temperature}
        said = _post(
            f"{endpoint.rstrip('/')}/api/generate",
            {"model": model, "prompt": prompt, "stream": False, "options": options},
        )
        text = said.get("response")
        tokens = {"prompt_tokens": said.get("prompt_eval_count"), "output_tokens": said.get("eval_count")}
    if not isinstance(text, str):
        raise TaskError("NO_ANSWER", "the model's server sent an answer without text")
    return {"text": text, "model": str(said.get("model") or model), "usage": tokens}


def _post(url: str, payload: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310  # the operator's own address
        url, json.dumps(payload).encode(), {"Content-Type": "application/json"}
    )
    # No proxy: the address belongs to this network.
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as reply:
            body = reply.read(MAX_REPLY + 1)
    except urllib.error.HTTPError as error:
        raise TaskError("REFUSED", f"the model's server answered {error.code}") from None
    except OSError as error:
        raise TaskError("UNREACHABLE", f"cannot reach the model's server: {error}") from None
    if len(body) > MAX_REPLY:
        raise TaskError("TOO_LONG", f"the model's server sent more than {MAX_REPLY} bytes")
    try:
        return _object(json.loads(body))
    except (ValueError, RecursionError):
        raise TaskError("NO_ANSWER", "the model's server sent an answer that is not JSON") from None


def _first(value: object) -> dict[str, Any]:
    return _object(value[0]) if isinstance(value, list) and value else {}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
