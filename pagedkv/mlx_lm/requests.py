"""What a request to the server may contain. Everything else is refused, by field, with a status.

Types and ranges that hold for every model are checked here, before a request reaches the thread
that generates; those that follow from a model's vocabulary are checked by `check_vocabulary` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

LARGEST = 2**31 - 1
PROMPTS, MESSAGES, BIASES = 128, 10_000, 1024  # in a request
TEMPLATE_ARGUMENTS = frozenset(
    {
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
        *("self", "conversations", "documents"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Arguments of a tokenizer's `apply_chat_template`; others reach the template as variables."""
OURS = "n", "best_of", "echo", "suffix", "cache_salt"  # fields that mlx-lm's server does not know


class RequestError(ValueError):
    """A request that is refused.

    Parameters
    ----------
    message : str
        Why.
    param : str or None
        Which field.
    status : int
        HTTP's.
    code : str or None
        As OpenAI's API names it.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's API has it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def _divides(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError(f"expected 0, or 0.01 at least, got {value}")
    return value


def _is_token(name: str) -> str:
    if not (name.isascii() and name.isdigit() and len(name) <= 10):
        raise ValueError(f"expected token ids as keys, got {name[:50]!r}")
    return name


Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
# Scores are divided by these: a smaller one overflows float16.
Divisor = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(_divides)]
Word = Annotated[str, Field(min_length=1, max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Part):
    """`stream_options`."""

    include_usage: bool = False


class ContentPart(_Part):
    """A part of a message's content."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _has_text(self) -> ContentPart:
        if self.type == "text" and self.text is None:
            raise ValueError("expected a text in a part of type text")
        return self


class Function(_Part):
    """The function of a tool call."""

    name: str
    arguments: str | dict[str, Any] = ""

    @model_validator(mode="after")
    def _has_json(self) -> Function:
        if self.arguments and isinstance(self.arguments, str):
            from_json(self.arguments)  # mlx-lm hands them to the template as an object
        return self


class ToolCall(_Part):
    """A tool call of an earlier answer."""

    function: Function


class Message(_Part):
    """A message of a chat."""

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None


class Tool(_Part):
    """A tool that the model may call."""

    type: str
    function: dict[str, Any]


class _Common(BaseModel):
    """Fields of both kinds of requests."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    draft_model: str | None = None
    adapters: str | None = None
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Divisor | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
    min_p: Share | None = None
    num_draft_tokens: Annotated[int, Field(ge=1, le=64)] | None = None
    repetition_penalty: Divisor | None = None
    repetition_context_size: Count | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: Count | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: Count | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, AfterValidator(_is_token)], Penalty], Field(max_length=BIASES)
        ]
        | None
    ) = None
    top_logprobs: Annotated[int, Field(ge=-1, le=11)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Word | Annotated[list[Word], Field(max_length=16)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1000)] | None = None

    def normalized(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body that mlx-lm's server takes: its own types, and no nulls but in messages.

        Parameters
        ----------
        body : dict
            What this was validated from.
        """
        whole = {"messages", "tools", "role_mapping", "chat_template_kwargs", "prompt"}
        kept = {name: body[name] for name in whole & body.keys()}
        body = kept | self.model_dump(exclude_none=True, exclude={*OURS, *whole})
        for name in ("xtc_probability", "xtc_threshold"):
            if name in body:
                body[name] = float(body[name])
        if body.get("top_k") == -1:  # as other servers write "all"
            body["top_k"] = 0
        if "seed" in body:
            body["seed"] %= 2**64
        return body


class ChatRequest(_Common):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]
    tools: list[Tool] | None = None
    role_mapping: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None

    @property
    def size(self) -> int:
        """Characters of the messages."""
        parts = [
            part.text or ""
            for message in self.messages
            for part in (message.content if isinstance(message.content, list) else ())
        ]
        texts = [one.content for one in self.messages if isinstance(one.content, str)]
        return sum(map(len, parts + texts))

    def check(self, *, allows_templates: bool, has_images: bool) -> None:
        """Raise RequestError for what this server's options or this kind of model do not allow.

        Parameters
        ----------
        allows_templates : bool
            Whether a request may bring a chat template, which is a program.
        has_images : bool
            Whether the model sees images.
        """
        refused = TEMPLATE_ARGUMENTS & set(self.chat_template_kwargs or ())
        if allows_templates:
            refused -= {"chat_template"}
        if refused:
            raise RequestError(
                f"expected variables of the chat template, got {', '.join(sorted(refused))}",
                "chat_template_kwargs",
            )
        for message in self.messages:
            if isinstance(message.content, list):
                for part in message.content:
                    if part.type != "text" and not (part.type == "image_url" and has_images):
                        raise RequestError(
                            f"expected text, which is all that this model takes, got {part.type}",
                            "messages",
                        )


class TextRequest(_Common):
    """The body of ``/v1/completions``."""

    prompt: (
        str
        | list[Count]  # of token ids
        | Annotated[list[str | list[Count]], Field(min_length=1, max_length=PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=11)] | bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt) or [[]]  # type: ignore[arg-type]

    def normalized(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body that mlx-lm's server takes: of OpenAI's `logprobs` it has two fields."""
        body = super().normalized(body)
        asked = body.pop("logprobs", None)
        if asked is not None and asked is not False:
            body["logprobs"] = True
            if asked is not True and asked > 0:
                body.setdefault("top_logprobs", int(asked))
        return body


def parse(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body, without its nulls; RequestError for anything else."""
    try:
        body = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"expected JSON, got an error: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(f"expected a JSON object, got {type(body).__name__}")
    return {name: value for name, value in body.items() if value is not None}


def validated(kind: type[_Common], body: dict[str, Any]) -> Any:
    """Return a validated request; RequestError names the first wrong field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first, *_ = error.errors(include_url=False, include_context=False, include_input=False)
        name = str(first["loc"][0]) if first["loc"] else None
        said = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{name or 'the body'}: {said}", name) from None


def check_vocabulary(
    size: int,
    *,
    top_k: int = 0,
    top_logprobs: int = 0,
    logit_bias: dict[int, float] | None = None,
    tokens: Sequence[int] = (),
) -> None:
    """Raise RequestError for token ids that a vocabulary of `size` does not have.

    MLX checks no index on a device: a bias outside of it would be written into other memory.
    """
    for name, count in (("top_k", top_k), ("top_logprobs", top_logprobs)):
        if count >= size:
            raise RequestError(f"expected less than {size} of {name}, got {count}", name)
    for token in logit_bias or ():
        if not 0 <= token < size:
            raise RequestError(f"expected token ids below {size}, got {token}", "logit_bias")
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        worst = max(tokens) if max(tokens) >= size else min(tokens)
        raise RequestError(f"expected token ids below {size}, got {worst}", "prompt")
