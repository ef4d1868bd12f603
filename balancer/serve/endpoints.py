"""What a request asks for, as far as placing it needs to know: from its path and its body. Pure; changes neither.

A body is parsed to be looked at; what goes on to the engine are its own bytes (`wire` splices, and says where).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson

PLACED = frozenset(
    (
        b"/v1/chat/completions",
        b"/v1/completions",
        b"/v1/responses",
        b"/v1/messages",
        b"/v1/embeddings",
        b"/generate",
    )
)
"""Paths whose POST is placed on a rank; every other request passes through to some engine."""

IMAGE_TOKENS = 1_000
"""Booked for an image or a file, whose tokens only the engine knows."""
_MESSAGE_TOKENS = 4
"""What a chat template puts around a message."""
_TEXT_KEYS = ("content", "text", "tool_calls", "function", "arguments", "input", "output", "name")
_RID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
"""An id that the body brings along is used where it can stand in a header; the engine gets it in either case."""
_HOST = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
_LENIENT_MOST = 1 << 20
_DEEPEST = 64
MOST_PARTS, MOST_VALUES = 1 << 17, 1 << 21
"""Objects, lists and strings in a body; values (twice the token ids of the longest context there is)."""
_STRETCH = 1 << 18


class Malformed(ValueError):
    """The body is not what this path takes. The message is for the client, and quotes none of it."""


@dataclass(slots=True)
class Asked:
    """What a body tells: `ids`: prompt tokens where it carries token ids; `texts`: what else has to be counted, with
    `extra` tokens beside; `copies`: answers wanted per prompt; `is_list`: prompts come in a list, even of one;
    `rid`: an id of its own."""

    ids: int = 0
    texts: list[str] | None = None
    extra: int = 0
    copies: int = 1
    is_list: bool = False
    rid: str | None = None
    has_rid: bool = False
    has_xargs: bool = False
    is_object: bool = False
    """Whether the body has been read as one, and so can be added to."""

    @property
    def fans_out(self) -> bool:
        """Whether the engine makes requests of its own, with ids of its own, of this one."""
        return self.is_list or self.copies > 1


def is_placed(method: str, path: bytes) -> bool:
    """Whether a request is placed on a rank; `path` without its query."""
    return method == "POST" and path in PLACED


def origin_form(target: bytes) -> bytes:
    """The target without the scheme and the host that a client may name in it (RFC 9112, 3.2.2)."""
    if not (host := _HOST.match(target)):
        return target
    rest = target[host.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def path_of(target: bytes) -> bytes:
    """The path of a target as it stands, but of a path that is placed the plain form, however it was written.

    Engines under uvicorn unquote once, %2F too, cut off a fragment and neither fold `..` nor `//`: so does this.
    """
    path = target.partition(b"?")[0]
    if b"%" not in path and b"#" not in path:
        return path
    plain = unquote_to_bytes(path.partition(b"#")[0])
    return plain if plain in PLACED else path


def check_width(body: bytes) -> None:
    """Refuse (`Malformed`) a body of so many parts that to parse it would take seconds and a hundred times its size.

    A long text or picture is one part. Meant for a thread: it lets others run after each stretch.
    """
    if not _is_wide(body, skips_strings=False):
        return
    if _is_wide(body, skips_strings=True):  # commas and braces of a text of code or figures separate nothing
        raise Malformed(f"the body has more than {MOST_PARTS:,} objects, lists and strings, or {MOST_VALUES:,} values")


def _is_wide(body: bytes, skips_strings: bool) -> bool:
    parts = values = start = 0
    is_inside = False
    while start < len(body):
        end = start + _STRETCH
        while body[end - 1 : end] == b"\\":
            end += 1
        stretch = body[start:end]
        if skips_strings:
            pieces = stretch.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
            stretch = b"".join(pieces[is_inside::2])
            is_inside ^= len(pieces) % 2 == 0
            parts += len(pieces) // 2
        parts += len(stretch) - len(stretch.translate(None, b"[{")) + stretch.count(b'"') // 2
        values += stretch.count(b",")
        if parts > MOST_PARTS or values > MOST_VALUES:
            return True
        start = end
    return False


def read_body(path: bytes, body: bytes) -> Asked:
    """What a body for `path` asks for; raises `Malformed`."""
    fields = _parsed(body)
    if not isinstance(fields, dict):
        raise Malformed("the body must be a JSON object")
    asked = Asked(texts=[], is_object=True, has_xargs="vllm_xargs" in fields)
    key = "request_id" if path == b"/v1/responses" else "rid"
    asked.has_rid = key in fields
    if isinstance(rid := fields.get(key), str) and _RID.fullmatch(rid):
        asked.rid = rid
    if path == b"/generate":
        _read_generate(fields, asked)
    elif path in (b"/v1/completions", b"/v1/embeddings"):
        _read_prompts(fields.get("prompt") if path == b"/v1/completions" else fields.get("input"), asked)
    else:
        _read_messages(fields, asked)
    copies = fields.get("n")
    if path == b"/generate":
        sampling = fields.get("sampling_params")
        copies = sampling.get("n") if isinstance(sampling, dict) else None
    if isinstance(copies, int) and not isinstance(copies, bool) and 1 < copies <= 1024:
        asked.copies = copies
    return asked


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # Engines read by Python's own parser, which takes NaN and Infinity too.
        if len(body) <= _LENIENT_MOST and (b"NaN" in body or b"Infinity" in body):
            try:
                return json.loads(body.decode())  # of bytes it would take UTF-16 too, and a byte order mark
            except (ValueError, RecursionError):
                pass
        raise Malformed(f"the body is not JSON: {error.msg} at character {error.pos}") from None


def written(part: Any) -> bytes:
    """The JSON of a part of a body; raises `Malformed` where it can be read and not be written."""
    try:
        return orjson.dumps(part)
    except TypeError as error:
        raise Malformed(f"a part of the body cannot be written as JSON: {error}") from None


def _read_generate(fields: dict[str, Any], asked: Asked) -> None:
    for field in ("routed_dp_rank", "data_parallel_rank"):
        if field in fields:  # the last of two counts: it would outdo ours
            raise Malformed(f"the rank is the dispatcher's to choose: leave {field} out")
    if (ids := fields.get("input_ids")) is not None:
        _read_prompts(ids, asked)
    elif (text := fields.get("text")) is not None:
        _read_prompts(text, asked)
    for medium in ("image_data", "video_data", "audio_data"):
        if data := fields.get(medium):
            asked.extra += IMAGE_TOKENS * (len(data) if isinstance(data, list) else 1)


def _read_prompts(prompt: Any, asked: Asked) -> None:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    assert asked.texts is not None
    if isinstance(prompt, str):
        asked.texts.append(prompt)
    elif isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            asked.ids += len(prompt)
            return
        asked.is_list = True
        for one in prompt:
            if isinstance(one, str):
                asked.texts.append(one)
            elif isinstance(one, list):
                asked.ids += len(one)


def _read_messages(fields: dict[str, Any], asked: Asked) -> None:
    """Chat, responses and messages: every text that a template may put into the prompt."""
    assert asked.texts is not None
    listed = fields.get("messages", fields.get("input"))
    if isinstance(listed, str):
        asked.texts.append(listed)
    elif isinstance(listed, list):
        asked.extra += _MESSAGE_TOKENS * len(listed)
        for message in listed:
            _gather(message, asked, asked.texts)
    for key in ("system", "instructions", "prompt"):
        if (more := fields.get(key)) is not None:
            _gather(more, asked, asked.texts)
    if tools := fields.get("tools"):
        asked.texts.append(written(tools).decode())


def _gather(part: Any, asked: Asked, texts: list[str], depth: int = 0) -> None:
    """Add every text of a message or of a part of one."""
    if isinstance(part, str):
        texts.append(part)
    elif isinstance(part, list) and depth < _DEEPEST:
        for one in part:
            _gather(one, asked, texts, depth + 1)
    elif isinstance(part, dict) and depth < _DEEPEST:
        kind = part.get("type")
        if isinstance(kind, str) and ("image" in kind or "audio" in kind or "video" in kind or "file" in kind):
            asked.extra += IMAGE_TOKENS
            return
        for key in _TEXT_KEYS:
            if (more := part.get(key)) is not None:
                _gather(more, asked, texts, depth + 1)
