"""`model.generate` through the compiled decoder, where it does what transformers would do; through transformers else.

transformers prepares everything itself, as always: it is asked to generate with a decoding loop of ours (its
`custom_generate`), which looks at what was prepared and either decodes or declines, before anything has happened.
Declining gives a warning, once for each reason, and stands in `model.why_not_compiled`.

Law (tests/test_decoding.py): greedy tokens are those of transformers' own loop on the model in float32, up to the
rounding of float32, and so are sampled ones from the same seed.

Shape suffixes: T = tokens, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from upq.decoding._parts import Unsuitable, parts
from upq.decoding._session import Session

_log = logging.getLogger("upq")

# Arguments of `generate` that ask for another loop, another model or another cache; and the tokenizer of stop_strings,
# which transformers 5.23 loses on its way to a loop that is not its own.
_NOT_OURS = (
    "assistant_model", "cache_implementation", "custom_generate", "past_key_values", "position_ids", "tokenizer",
)  # fmt: skip
# What transformers hands to a decoding loop for one plain text.
_PLAIN = {"attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}


def attach(model: Any) -> None:
    """From now on `model.generate` uses the compiled decoder where it can."""
    model._decoding = _State()
    plain: Any = type(model)
    model.__class__ = _compiled_class(plain)


def session(model: Any) -> Session:
    """The session of an attached model: made when first asked for, and again when its weights have changed.

    Raises Unsuitable.
    """
    if not isinstance(model, _Compiled):
        raise Unsuitable("it is not packed, or was not loaded by upq.load")
    state, found = model._decoding, parts(model)  # type: ignore[arg-type]
    if state.session is None or not state.session.is_of(found):
        state.session = None  # its cache goes before the new one comes
        state.session = Session(found)
    return state.session


class _State:
    """What a model keeps between two calls. Copies and pickles of the model start without."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.busy = Lock()
        self.warned: set[str] = set()
        self.why_not: str | None = None

    def __reduce__(self) -> tuple[type[_State], tuple[()]]:
        return _State, ()

    @contextmanager
    def alone(self) -> Iterator[None]:
        if not self.busy.acquire(blocking=False):
            raise Unsuitable("another thread is generating with this model")
        try:
            yield
        finally:
            self.busy.release()

    def declined(self, reason: Unsuitable) -> None:
        self.why_not = str(reason)
        if self.why_not not in self.warned:
            self.warned.add(self.why_not)
            _log.warning("transformers generates, not the compiled decoder: %s", reason)


class _Compiled:
    """Comes before the class of a model that was attached."""

    _decoding: _State

    @property
    def why_not_compiled(self) -> str | None:
        """Why transformers did the last generation; None if the compiled decoder did."""
        return self._decoding.why_not

    def generate(self, inputs: Any = None, generation_config: Any = None, *others: Any, **options: Any) -> Any:
        plain: Any = super().generate  # type: ignore[misc]
        try:
            if others:
                raise Unsuitable("more than two arguments without their names")
            for name in _NOT_OURS:
                if options.get(name) is not None:
                    raise Unsuitable(f"{name} was given")
            with self._decoding.alone():
                loop = _loop(options.get("streamer"))
                # It gets the streamer from us: transformers would show it the prompt before we could decline.
                ours = {**options, "streamer": None, "custom_generate": loop}
                found = plain(inputs, generation_config, **ours)
        except Unsuitable as reason:
            self._decoding.declined(reason)
            return plain(inputs, generation_config, *others, **options)
        self._decoding.why_not = None
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickled by the class in transformers: this one is made at run time, and no module has it.
        return _blank, (type(self).__bases__[1],), self.__dict__


@cache
def _compiled_class(base: Any) -> Any:
    # The name stays: save_pretrained writes it into config.json.
    return type(base.__name__, (_Compiled, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _blank(base: type) -> Any:
    compiled = _compiled_class(base)
    return compiled.__new__(compiled)


def _loop(streamer: Any) -> Callable[..., Tensor]:
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
        held, ids_1T = session(model), input_ids
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
        if name not in _PLAIN and value is not None:
            raise Unsuitable(f"{name} was given")
