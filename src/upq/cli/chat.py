"""`upq chat`: talk to a model in the terminal."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upq.core.errors import UPQError
from upq.core.paths import local_or_hub

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

Message = dict[str, str]


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An artefact, or any model transformers loads.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this once and exit, instead of a conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus to sample from.")] = 0.95,
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="A second model, which answers every message beside the first.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Stream answers to your messages; the history is kept. /reset forgets it, /exit or Ctrl-D leaves."""
    from upq.run.console import console, styled
    from upq.run.reporter import loading

    with loading():
        from upq.run.quiet import quiet_libraries

    quiet_libraries()
    shown = console()
    names = [local_or_hub(each) for each in (model, against) if each is not None]
    tokenizers = [chat_tokenizer(each) for each in names]
    loaded = [_load(each, device) for each in names]
    options = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    talk = _Talk(shown, names, loaded, tokenizers, options, start)
    if prompt is not None:
        talk.ask(prompt)
        return
    shown.print(styled(("/reset forgets the conversation, /exit leaves", "dim")))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C may mean the answer alone
    while True:
        try:
            text = shown.input(styled(("you ›", "bold cyan"), " ")).strip()
        except EOFError:
            shown.print()
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            talk.reset()
            continue
        if not text:
            continue
        if len(names) == 1:
            shown.print(styled(("model ›", "bold green"), " "), end="")
        try:
            talk.ask(text)
        except KeyboardInterrupt:  # stops the answer, not the conversation
            shown.print(styled((" (stopped)", "dim")))


class _Talk:
    """The conversation with one model, or with two, each of which has a history of its own."""

    def __init__(
        self,
        console: Console,
        names: list[str],
        models: list[PreTrainedModel],
        tokenizers: list[PreTrainedTokenizerBase],
        options: dict[str, Any],
        start: list[Message],
    ) -> None:
        from upq.cli.side_by_side import Side

        self._console, self._options, self._start = console, options, start
        self._sides = [
            Side(title, model, tokenizer, list(start))
            for title, model, tokenizer in zip(_titles(names), models, tokenizers, strict=True)
        ]

    def reset(self) -> None:
        for side in self._sides:
            side.history = list(self._start)

    def ask(self, text: str) -> None:
        """Print the answers as they come. Interrupted, the question was not asked."""
        from upq.cli.side_by_side import Columns, live

        asked: Message = {"role": "user", "content": text}
        if len(self._sides) == 1:
            (side,) = self._sides
            replies = [answer(side.model, side.tokenizer, [*side.history, asked], self._options)]
        else:
            for side in self._sides:
                side.said = side.speed = ""
            with live(self._console, self._sides) as shown:
                replies = [
                    answer(
                        side.model,
                        side.tokenizer,
                        [*side.history, asked],
                        self._options,
                        Columns(side, shown, self._sides),
                    )
                    for side in self._sides
                ]
        for side, reply in zip(self._sides, replies, strict=True):
            side.history += [asked, {"role": "assistant", "content": reply}]


def _titles(names: list[str]) -> list[str]:
    """The last parts of the paths, where these differ."""
    last = [name.rstrip("/").rpartition("/")[2] for name in names]
    return last if len(set(last)) == len(last) else names


def chat_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """A tokenizer that writes conversations. Raises UPQError."""
    from upq.model.loading import embedding_rows, load_config, load_tokenizer
    from upq.text.tokenizer import check_ids

    tokenizer = load_tokenizer(model)
    if not getattr(tokenizer, "chat_template", None):
        raise UPQError(f"{model}: no chat template in its tokenizer; name an instruction-tuned model")
    check_ids(tokenizer, embedding_rows(load_config(model)), model)
    return tokenizer


def _load(model: str, device: str) -> PreTrainedModel:
    import torch

    from upq.artifact.transformers import load
    from upq.core.precision import to_compute_dtype
    from upq.run.reporter import loading

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with loading(what=model):
        loaded = load(model, device=device)
        # An artefact runs compiled, in float32 but for its weights.
        return to_compute_dtype(loaded) if getattr(loaded, "hf_quantizer", None) is None else loaded


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    history: list[Message],
    options: dict[str, Any],
    streamer: TextStreamer | None = None,
) -> str:
    """Print the model's answer to `history` as it comes, or give it to `streamer`, and return it."""
    import torch
    from transformers import TextStreamer

    from upq.data.conversations import refusals
    from upq.model.loading import context_of, embedding_rows
    from upq.text.generation import end_tokens, generating, own_distribution
    from upq.text.tokenizer import check_tokens

    with refusals("chat"):
        encoded: Any = tokenizer.apply_chat_template(
            history, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    length = encoded["input_ids"].shape[1]
    if not length:
        raise UPQError("the chat template makes no token of this conversation; write something")
    check_tokens(tokenizer, encoded["input_ids"][0].tolist(), embedding_rows(model.config), "chat")
    limit = context_of(model.config)
    room = options["max_new_tokens"] if limit is None else limit - length
    if room < 1:
        raise UPQError(f"the conversation is {length} tokens, the model's context {limit}; /reset forgets it")
    streamer = streamer or TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = end_tokens(model.generation_config, tokenizer)
    settings = own_distribution(ends, tokenizer, **{**options, "max_new_tokens": min(options["max_new_tokens"], room)})
    generate: Any = model.generate
    with torch.inference_mode(), generating(model, settings):
        out = generate(
            encoded["input_ids"].to(model.device),
            attention_mask=encoded["attention_mask"].to(model.device),
            generation_config=settings,
            streamer=streamer,
        )
    text = tokenizer.decode(out[0, length:], skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()
