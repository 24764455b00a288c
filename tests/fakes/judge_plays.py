"""What one request to the judge's stand-in may get: a good answer, or one of the ways in which endpoints misbehave."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse, Response
from PIL import Image

Grade = Callable[[list[Image.Image], str], float]
Score = Callable[[list[Image.Image], str], str]

SNAPSHOT = "judge-2025-04-14"
PROMPT_TOKENS, COMPLETION_TOKENS = 100, 20


@dataclass(frozen=True)
class Play:
    """What one request gets (see PLAYS). `when`: text it must contain. times: for how many requests, 0 for all.

    headers: of the answer. seconds: wait before it. content: what the message says in place of the grades.
    top: alternatives of each answer token as [token, log-probability].
    """

    kind: str
    when: str = ""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    content: str | None = None
    top: tuple[tuple[tuple[str, float], ...], ...] | None = None


@dataclass(frozen=True)
class Asked:
    """One request and the play it gets."""

    grade: Grade
    score: Score | None
    body: dict[str, Any]
    images: list[Image.Image]
    text: str
    play: Play

    def good(self) -> str:
        """The grades, in the form the text asks for."""
        if self.play.content is not None:
            return self.play.content
        if self.score is not None:
            return self.score(self.images, self.text)
        grade = self.grade(self.images, self.text)
        names = grade_names(self.text)
        if not names:
            return str(round(9 * grade))
        return json.dumps({"reasoning": "seen", **dict.fromkeys(names, round(10 * grade))})

    def reply(self, content: str | None, *, finish: str = "stop", refusal: str | None = None) -> Response:
        """A chat completion, with log-probs when they are asked for."""
        message = {"role": "assistant", "content": content, "refusal": refusal}
        logprobs = {"content": self._tokens(content or "")} if self.body.get("logprobs") else None
        choice = {"index": 0, "finish_reason": finish, "message": message, "logprobs": logprobs}
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
        usage["total_tokens"] = PROMPT_TOKENS + COMPLETION_TOKENS
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": SNAPSHOT}
        return JSONResponse(answer | {"choices": [choice], "usage": usage}, headers=self.play.headers)

    def _tokens(self, content: str) -> list[dict[str, Any]]:
        """One token a character. The first digit's alternatives have 9 x grade as their expectation."""
        tops = self.play.top
        if tops is None:
            value = 9 * self.grade(self.images, self.text)
            low = math.floor(value)
            shares = {str(low): 1 - (value - low), str(low + 1): value - low}
            digits = tuple((digit, math.log(share)) for digit, share in shares.items() if share > 0)
            tops = tuple(digits if character.isdigit() else ((character, 0.0),) for character in content)
        return [
            {
                "token": character,
                "logprob": top[0][1],
                "top_logprobs": [{"token": t, "logprob": p} for t, p in top],
            }
            for character, top in zip(content, tops, strict=False)
        ]


def grade_names(text: str) -> list[str]:
    """The grades that a text asks for: words at the start of a line, followed by their meaning."""
    return list(
        dict.fromkeys(re.findall(r"^(?!reasoning)([a-z]+)(?: -|:) (?:how|whether) ", text, re.MULTILINE))
    )


def error(status: int, message: str, code: str | None, play: Play, **more: Any) -> Response:
    error = {"message": message, "type": "error", "param": None, "code": code, **more}
    return JSONResponse({"error": error}, status_code=status, headers=play.headers)


def _fails(status: int, code: str | None = None, **more: Any) -> Callable[[Asked], Response]:
    return lambda asked: error(status, f"played {asked.play.kind}", code, asked.play, **more)


def _regrade(asked: Asked, grade: str) -> str:
    """The good answer with another value for every grade."""
    return re.sub(r"(\": )\d+", rf"\g<1>{grade}", asked.good())


PLAYS: dict[str, Callable[[Asked], Response]] = {
    "ok": lambda asked: asked.reply(asked.good()),
    "slow": lambda asked: asked.reply(asked.good()),
    "fenced": lambda asked: asked.reply(f"```json\n{asked.good()}\n```"),
    "prose": lambda asked: asked.reply(f"I looked closely. {asked.good()} That is my verdict."),
    "single_quotes": lambda asked: asked.reply(asked.good().replace('"', "'")),
    "trailing_comma": lambda asked: asked.reply(asked.good().replace("}", ",}")),
    "out_of_range": lambda asked: asked.reply(_regrade(asked, "11")),
    "nan": lambda asked: asked.reply(_regrade(asked, "NaN")),
    "nonsense": lambda asked: asked.reply("It is what it is."),
    "empty": lambda asked: asked.reply(""),
    "refusal": lambda asked: asked.reply(None, refusal="I'm sorry, I can't help with that."),
    "filtered": lambda asked: asked.reply(asked.good(), finish="content_filter"),
    "truncated": lambda asked: asked.reply(asked.good()[:-5], finish="length"),
    "truncated_whole": lambda asked: asked.reply(asked.good(), finish="length"),
    "tool_calls": lambda asked: asked.reply(asked.good(), finish="tool_calls"),
    "no_choices": lambda asked: JSONResponse({"id": "1", "object": "chat.completion", "choices": []}),
    "error_200": lambda asked: JSONResponse({"error": {"message": "upstream failed", "code": 502}}),
    "not_json": lambda asked: Response("{half", media_type="application/json"),
    "web_page": lambda asked: Response("<html>busy</html>", media_type="text/html"),
    "filtered_400": _fails(400, "content_filter"),
    "azure_400": _fails(400, None, innererror={"code": "ResponsibleAIPolicyViolation"}),
    "bad_request": _fails(400, "unsupported_parameter"),
    "unauthorized": _fails(401, "invalid_api_key"),
    "forbidden": _fails(403),
    "not_found": _fails(404, "model_not_found"),
    "too_large": _fails(413),
    "bad_image": _fails(400, "invalid_image_format"),
    "unprocessable": _fails(422),
    "request_timeout": _fails(408),
    "too_early": _fails(425),
    "rate_limited": _fails(429, "rate_limit_exceeded"),
    "quota": _fails(429, "insufficient_quota"),
    "error_500": _fails(500),
    "overloaded": _fails(503),
}
"""By kind; `reset` and `reset_in_body` cut the connection. `slow` is `ok` after `seconds`."""
