"""What clients may ask for, in the words of the OpenAI protocol; whatever is not here is refused by name.

`null` is as good as leaving a field out. Numbers are numbers: `"5"` is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

_MOST_STOPS, _MOST_CHOICES, _MOST_TOP, _MOST_TOOLS = 16, 128, 20, 128
_LONGEST_STOP = 256  # characters; every token is compared with every beginning of each
# A body is looked at while all other requests wait: 2048 messages take 0.05 s.
_MOST_ITEMS, _MOST_FIELDS = 2048, 64


class Refused(Exception):
    """A request that gets the protocol's error object for an answer."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers: dict[str, str] = {}


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The protocol's error object."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """The first of pydantic's errors, by the name of its field."""
    error = errors[0]
    # FastAPI puts "body" in front.
    where = ".".join(str(part) for part in error["loc"] if part != "body")
    match error["type"]:
        case "extra_forbidden":
            return Refused(f"'{where}' is not supported; leave it out", param=where, code="unsupported")
        case "missing":
            return Refused(f"'{where or 'the body'}' is missing", param=where or None)
        case "json_invalid":
            return Refused("the body is not valid JSON")
        case "model_attributes_type" if not where:
            return Refused("the body is not a JSON object; send one with 'Content-Type: application/json'")
    said = str(error["msg"]).removeprefix("Value error, ")
    return Refused(f"'{where}': {said}" if where else said, param=where or None)


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {k: v for k, v in given.items() if v is not None}
        if len(kept) > _MOST_FIELDS:  # pydantic would make an error of each
            raise ValueError(f"an object has {len(kept)} fields; expected at most {_MOST_FIELDS}")
        return kept


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


def _biases(given: Any) -> Any:
    """JSON's keys are texts."""
    if not isinstance(given, dict) or not all(isinstance(k, str) and k.isdecimal() for k in given):
        raise ValueError("expected token ids with numbers")
    if len(given) > _MOST_ITEMS:
        raise ValueError(f"{len(given)} biases are too many; expected at most {_MOST_ITEMS}")
    return {int(key): value for key, value in given.items()}


class StreamOptions(_Fields):
    include_usage: bool = False


class SamplingFields(_Fields):
    """What both kinds of request have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=_MOST_CHOICES)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01)
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_biases)] = {}
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]],
        FailFast(),
        Field(max_length=_MOST_STOPS),
        BeforeValidator(_as_list),
    ] = []
    user: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream: true")
        return self


# --- completions -------------------------------------------------------------------------------------------------


def _prompts(given: Any) -> Any:
    """A text, token ids, or a list of either, as the list."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(type(one) is int for one in given):
            return [given]
        if all(isinstance(one, str) for one in given):
            return given
        if all(isinstance(one, list) and one and all(type(i) is int for i in one) for one in given):
            return given
    raise ValueError("expected a text, token ids, or a list of either")


class CompletionRequest(SamplingFields):
    prompt: Annotated[
        list[str | list[int]], FailFast(), Field(max_length=_MOST_ITEMS), BeforeValidator(_prompts)
    ]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=_MOST_TOP)


# --- chat --------------------------------------------------------------------------------------------------------


def _content(given: Any) -> Any:
    """A text, or its parts joined; parts of other kinds are refused."""
    if not isinstance(given, list):
        return given
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type {kind!r} is not supported; give text")
    return "".join(part["text"] for part in given)


class CalledFunction(_Fields):
    name: str
    arguments: str = "{}"
    parsed_arguments: Any = None  # what openai's client makes of them and sends back


class ToolCall(_Fields):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # of a call that was streamed


class ChatMessage(_Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FailFast()] = []
    tool_call_id: str | None = None
    parsed: Any = None  # what openai's client makes of a content and sends back

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: `developer` is what `system` was, and arguments are data."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        message |= {k: v for k in ("name", "tool_call_id") if (v := getattr(self, k)) is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _function(call.function)}
                for call in self.tool_calls
            ]
        return message


def _function(called: CalledFunction) -> dict[str, Any]:
    try:
        return {"name": called.name, "arguments": json.loads(called.arguments)}
    except ValueError:
        raise Refused(
            f"the arguments of the call of {called.name!r} are not JSON", param="messages"
        ) from None


class Function(_Fields):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool | None = None


class Tool(_Fields):
    type: Literal["function"]
    function: Function


class NamedFunction(_Fields):
    name: str


class NamedTool(_Fields):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Fields):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self


def _messages(given: Any) -> Any:
    if isinstance(given, list):
        calls = [one["tool_calls"] for one in given if isinstance(one, dict) and "tool_calls" in one]
        count = len(given) + sum(len(some) for some in calls if isinstance(some, list))
        if count > _MOST_ITEMS:
            raise ValueError(f"{count} messages and calls are too many; expected at most {_MOST_ITEMS}")
    return given


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1), BeforeValidator(_messages)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_TOP)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], FailFast(), Field(max_length=_MOST_TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs need logprobs: true")
        if self.tool_choice is not None and not self.tools:
            raise ValueError("tool_choice needs tools")
        names = {tool.function.name for tool in self.tools}
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools"
            )
        if self.response_format and self.response_format.type != "text" and self.tools:
            raise ValueError("response_format and tools do not go together; give one of them")
        return self
