"""`model.generate` through the compiled decoder, where it does what transformers would do; through transformers else.

transformers prepares everything itself, as always, and then calls a decoding loop of ours (its `custom_generate`).
The loop looks at what was prepared and either decodes or declines, before anything has happened. A reason to decline
is logged once, as a warning, and stands in `model.why_not_compiled`.

Law (tests/test_decoding.py): greedy tokens are those of transformers' own loop on the model in float32, up to the
rounding of float32, and so are sampled ones from the same seed.

Shape suffixes: T = tokens, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from upq.decoding._parts import Unsuitable, parts
from upq.decoding._session import Session
from upq.kernels import compute
from upq.model.cache import NAMES

_log = logging.getLogger("upq")

# Arguments of `generate` that ask for another loop, another model or another cache.
_NOT_OURS = ("assistant_model", "cache_implementation", "custom_generate", "position_ids", *NAMES)
# What transformers hands to a decoding loop for one plain text.
_PLAIN = {"attention_mask", "logits_to_keep", "position_ids", "use_cache", *NAMES}


def attach(model: Any) -> None:
    """From now on `model.generate` uses the compiled decoder where it can."""
    model.generate = _Generate(model)
    model.why_not_compiled = None


def session(model: Any) -> Session:
    """The session of an attached model: made at the first call, and again when its weights have changed.

    Raises Unsuitable.
    """
    generate = vars(model).get("generate")
    if not isinstance(generate, _Generate):
        raise Unsuitable("it is not packed, or was not loaded by upq.load")
    return generate.session()


class _Generate:
    """Stands in an attached model's `generate`, before the method of its class.

    `model.why_not_compiled` says why transformers did the last generation; None if the compiled decoder did.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._session: Session | None = None
        self._busy = Lock()
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[type[_Generate], tuple[Any]]:
        return _Generate, (self._model,)  # a copy or a pickle starts without session, lock and warnings

    def session(self) -> Session:
        if (how := compute()) == "reference":
            raise Unsuitable(f"the kernels are set to {how}")
        found = parts(self._model)
        if self._session is None or not self._session.is_of(found):
            self._session = None  # its cache goes before the new one comes
            self._session = Session(found)
        return self._session

    def __call__(self, inputs: Any = None, generation_config: Any = None, *others: Any, **options: Any) -> Any:
        model = self._model
        plain = type(model).generate
        if "token_type_ids" not in signature(model.forward).parameters:
            options.pop("token_type_ids", None)  # some tokenizers give them, and most decoders do not take them
        if options.get("use_cache") is None and getattr(generation_config, "use_cache", None) is None:
            options["use_cache"] = True  # one that the model's files say is for its training
        try:
            if others:
                raise Unsuitable("more than two arguments without their names")
            for name in _NOT_OURS:
                if options.get(name) is not None:
                    raise Unsuitable(f"{name} was given")
            # transformers 5.23 loses the tokenizer on its way to a loop that is not its own. Only stop_strings need it;
            # transformers' server gives one always.
            settings = (generation_config, model.generation_config)
            if any([options.get("stop_strings"), *(getattr(each, "stop_strings", None) for each in settings)]):
                raise Unsuitable("stop_strings were given")
            with self._alone():
                # The loop has the streamer: transformers would show it the prompt before the loop could decline.
                loop = self._loop(options.get("streamer"))
                ours = {**options, "tokenizer": None, "streamer": None, "custom_generate": loop}
                found = plain(model, inputs, generation_config, **ours)
        except Unsuitable as reason:
            model.why_not_compiled = str(reason)
            self._warn(model.why_not_compiled)
            return plain(model, inputs, generation_config, *others, **options)
        model.why_not_compiled = None
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise Unsuitable("another thread is generating with this model")
        try:
            yield
        finally:
            self._busy.release()

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning("transformers generates, not the compiled decoder: %s", reason)

    def _loop(self, streamer: Any) -> Callable[..., Tensor]:
        """A decoding loop for `generate(custom_generate=…)`."""

        def loop(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **prepared: Any,
        ) -> Tensor:
            _check_request(input_ids, generation_config, prepared)
            held, ids_1T = self.session(), input_ids
            if streamer is not None:
                streamer.put(ids_1T.cpu())
            logits_V = held.logits_V(ids_1T[0].tolist())
            while True:
                scores_1V = logits_processor(ids_1T, logits_V[None])
                if generation_config.do_sample:
                    token_1 = torch.multinomial(scores_1V.softmax(-1), num_samples=1)[0]
                else:
                    token_1 = scores_1V.argmax(-1)
                ids_1T = torch.cat([ids_1T, token_1[None]], -1)
                done = stopping_criteria(ids_1T, None)
                if streamer is not None:
                    streamer.put(token_1.cpu())
                if done.all():
                    break
                logits_V = held.extend_V(token_1.tolist())
            if streamer is not None:
                streamer.end()
            return ids_1T

        return loop


def _check_request(ids_1T: Tensor, config: Any, prepared: dict[str, Any]) -> None:
    """Whether this is one text, generated greedily or by sampling, and the tokens are all that is asked for."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise Unsuitable(mode.value.replace("_", " "))
    if ids_1T.shape[0] != 1:
        raise Unsuitable(f"a batch of {ids_1T.shape[0]}")
    if ids_1T.shape[1] == 0:
        raise Unsuitable("an empty prompt")
    if config.return_dict_in_generate:
        raise Unsuitable("return_dict_in_generate")
    if config.use_cache is False:
        raise Unsuitable("use_cache=False")
    mask = prepared.get("attention_mask")
    if mask is not None and not (mask == 1).all():
        raise Unsuitable("an attention mask with gaps")
    for name, value in prepared.items():
        if name not in _PLAIN and value is not None and not _of_text_alone(name, value):
            raise Unsuitable(f"{name} was given")


def _of_text_alone(name: str, value: Any) -> bool:
    """Whether an input of models with a tower says that there is nothing but text."""
    if name == "token_type_ids":  # images have ones
        return not value.any()
    return name == "mm_encoder_outputs" and not value
