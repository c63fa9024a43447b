"""What answers the requests of [`ppow_hf.data.writing`]: transformers, a vLLM in its own environment, or a server.

Each follows the target's plain distribution: no top-k, top-p or penalties.
"""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.targets import complete_batch, end_token_ids, padding_token_id, plain_distribution
from ..data.writing import Answer, Request
from .vllm_process import VLLMProcess

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
BATCHES_PER_CHUNK = 4
VLLM_CHUNK = 256  # enough to keep the engine's batches full; what an interruption loses at most
ATTEMPTS = 5
REQUEST_SECONDS = 600
REFUSALS = (400, 413, 422)  # of this request; other errors concern all of them

Result = TypeVar("Result")


def answer_of(ids: list[int], stop_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    """An [`Answer`] of the target's own tokens."""
    finished = bool(ids) and ids[-1] in stop_ids
    text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
    return Answer(text, ids, finished)


class TransformersWriter:
    """Batches of like length, padded on the left, with the target's own `generate`."""

    def __init__(
        self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, batch_size: int
    ):
        self.target, self.tokenizer = target, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.chunk_size = BATCHES_PER_CHUNK * batch_size
        self.context_length: int | None = getattr(target.config.get_text_config(), "max_position_embeddings", None)
        self.end_ids = end_token_ids(target.generation_config, tokenizer)

    def __call__(self, requests: list[Request]) -> list[Answer | None]:
        def likeness(number: int) -> tuple:
            return requests[number].temperature, -len(requests[number].prompt_ids)

        order = sorted(range(len(requests)), key=likeness)
        answers: list[Answer | None] = [None] * len(requests)
        with plain_distribution(self.target):
            while order:
                temperature = requests[order[0]].temperature
                batch = [n for n in order[: self.batch_size] if requests[n].temperature == temperature]
                order = order[len(batch) :]
                for number, answer in zip(batch, self._batch([requests[n] for n in batch]), strict=True):
                    answers[number] = answer
        return answers

    def _batch(self, requests: list[Request]) -> list[Answer]:
        stop_ids = sorted({*self.end_ids, *requests[0].stop_ids})
        longest = max(len(request.prompt_ids) for request in requests)
        room = self.max_new_tokens
        if self.context_length is not None:
            room = min(room, self.context_length - longest)
        written = complete_batch(
            self.target,
            [request.prompt_ids for request in requests],
            room,
            requests[0].temperature,
            requests[0].seed,
            stop_ids,
            padding_token_id(self.tokenizer, self.end_ids),
        )
        return [answer_of(ids, stop_ids, self.tokenizer) for ids in written]


class VLLMWriter(VLLMProcess):
    """A vLLM process in its own environment, given token ids and giving token ids; a context manager.

    Args:
        model (`str`): the target's folder or name.
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        end_ids (`list[int]`): its end-of-sequence tokens.
        max_new_tokens (`int`): tokens in the longest answer.
        python (`str`, *optional*): interpreter of vLLM's environment, see [`vllm_python`].
        answered (`Callable`, *optional*): called with the answers of a chunk so far, and the number of its requests.
        dtype (`str`, *optional*, defaults to `"auto"`), cpu_dtype (`str`, *optional*):
            Number format of the target, and another one on a CPU.
        engine: further arguments of `vllm.LLM`.

    Raises `RuntimeError`, with the last lines that vLLM printed, when it ends before it is told to.
    """

    chunk_size = VLLM_CHUNK

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: list[int],
        max_new_tokens: int,
        python: str | None = None,
        answered: Callable[[int, int], None] = lambda count, of: None,
        dtype: str = "auto",
        cpu_dtype: str | None = None,
        **engine: Any,
    ):
        self.tokenizer, self.end_ids, self.max_new_tokens = tokenizer, end_ids, max_new_tokens
        self.answered = answered
        self.context_length: int | None = None  # known once the engine is
        options = {"model": model, "generation_config": "vllm", "disable_log_stats": True}
        options |= {"dtype": dtype, "cpu_dtype": cpu_dtype, **engine}
        super().__init__("vllm_write_job.py", options, python)

    def __enter__(self) -> "VLLMWriter":
        self.context_length = self._start()["context_length"]
        return self

    def __call__(self, requests: list[Request]) -> list[Answer | None]:
        job: list[dict[str, Any]] = [
            {
                "prompt_ids": request.prompt_ids,
                "temperature": request.temperature,
                "max_tokens": min(self.max_new_tokens, (self.context_length or 0) - len(request.prompt_ids)),
                "stop_token_ids": sorted({*self.end_ids, *request.stop_ids}),
            }
            for request in requests
        ]
        found = self._ask(job)
        while isinstance(found, int):
            self.answered(found, len(job))
            found = self._receive()
        pairs = zip(found, job, strict=True)
        return [answer_of(ids, one["stop_token_ids"], self.tokenizer) for ids, one in pairs]


class ServerWriter:
    """An OpenAI-compatible server: `/chat/completions` for chats, `/completions` for texts.

    The key is read from `OPENAI_API_KEY`. A server tells text: the token ids are those of the text, with the end of
    sequence after it where the server says `stop`.

    Args:
        url (`str`): of the server; without a path, `/v1` is added.
        model (`str`): the target's name; another is taken where the server has but one.
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        max_new_tokens (`int`): tokens in the longest answer.
        context_length (`int`, *optional*): the target's.
        in_flight (`int`): requests sent at once.

    Raises `ValueError` for another kind of URL, for a server that cannot be reached, and for a model that it lacks.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        context_length: int | None,
        in_flight: int,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"--server: {url!r} is no address of a server. Pass one such as http://localhost:8000.")
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.tokenizer, self.max_new_tokens, self.context_length = tokenizer, max_new_tokens, context_length
        self.in_flight = in_flight
        self.chunk_size = BATCHES_PER_CHUNK * in_flight
        self.model = self._model(model)

    def __call__(self, requests: list[Request]) -> list[Answer | None]:
        with ThreadPoolExecutor(self.in_flight) as pool:
            answers = list(pool.map(self._answer, requests))
        if all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"--server: {self.url} refuses every request: {answers[0]}")
        for answer in answers:
            if isinstance(answer, str):
                logger.warning("%s refused a request: %s", self.url, answer)
        return [None if isinstance(answer, str) else answer for answer in answers]

    def _answer(self, request: Request) -> Answer | str:
        """The answer, or why the server refuses this request."""
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": request.temperature,
            "top_p": 1.0,
            "max_tokens": self.max_new_tokens,
        }
        if request.stop_text is not None:
            body["stop"] = [request.stop_text]
        if request.messages is not None:
            path, body["messages"] = "chat/completions", request.messages
            body |= request.template_inputs
        else:
            path, body["prompt"] = "completions", request.text
        try:
            choice = self._send(path, body)["choices"][0]
        except urllib.error.HTTPError as error:
            return f"{error.code} {' '.join(error.read(500).decode(errors='replace').split())}"
        text = (choice["message"]["content"] if request.messages is not None else choice["text"]) or ""
        finished = choice.get("finish_reason") == "stop"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return Answer(text, [*ids, end] if finished and end is not None else ids, finished, exact=False)

    def _model(self, name: str) -> str:
        try:
            served = [model["id"] for model in self._send("models")["data"]]
        except urllib.error.HTTPError as error:
            if error.code == 404:  # a server that does not list its models
                return name
            raise ValueError(f"--server: {self.url}/models answers {error.code} {error.reason}.") from error
        if name in served:
            return name
        if len(served) != 1:
            raise ValueError(f"--target: {self.url} serves no {name!r}, but {served}. Name one of them.")
        return served[0]

    def _send(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)

        def once() -> Any:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                return json.load(response)

        return _with_patience(once, self.url)


def _with_patience(once: Callable[[], Result], url: str) -> Result:
    """The result of `once`, tried again while the server is busy or away.

    Raises `HTTPError` where this request is refused or not known, `ValueError` where none will be answered.
    """
    for attempt in range(ATTEMPTS):
        try:
            return once()
        except urllib.error.HTTPError as error:
            if error.code in (*REFUSALS, 404):
                raise
            if error.code in (401, 403):
                raise ValueError(f"--server: {url} answers {error.code}. Set {KEY_VARIABLE} to its key.") from error
            reason: Any = f"answers {error.code} {error.reason}"
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = f"cannot be reached ({error})"
        if attempt < ATTEMPTS - 1:
            time.sleep(0.5 * 2**attempt)
    raise ValueError(f"--server: {url} {reason}. Run the same command again to go on where this one stopped.")
