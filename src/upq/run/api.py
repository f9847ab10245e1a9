"""The Python interface: what each command of the command line calls. `import upq` shows these functions as its own.

Wrong arguments raise UPQError, one line that names the option as the command line writes it: `--seq-len` is `seq_len`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias, TypedDict, cast

from upq.core.errors import UPQError
from upq.core.paths import local, local_or_hub
from upq.run.reporter import loading, reporting

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from upq.artifact.manifest import Manifest
    from upq.core.progress import Progress
    from upq.core.signals import Stop
    from upq.data.config import TextSource
    from upq.exports import Report
    from upq.run.plan import Machine, Plan
    from upq.run.recipe import Recipe

Text: TypeAlias = "str | Path | TextSource"


class Figures(TypedDict):
    """What `evaluate` returns, and `upq eval --json` writes. A measure that was not asked for has no key."""

    bits_per_weight: float
    bytes: int  # of the weight files
    compute: NotRequired[str]  # of a packed model: how its products were computed
    dtype: str  # that the model was computed in
    ppl: NotRequired[float]
    ppl_stderr: NotRequired[float]  # of all standard errors: over rows; none of a single row
    tokens: NotRequired[int]  # that count as targets of `ppl`
    kld: NotRequired[float]  # KL(teacher ‖ model), nats a token
    kld_stderr: NotRequired[float]
    top1: NotRequired[float]  # share of positions where teacher and model choose the same token
    top1_stderr: NotRequired[float]
    teacher_ppl: NotRequired[float]
    teacher_ppl_stderr: NotRequired[float]
    tasks: NotRequired[dict[str, dict[str, float]]]  # by task, with lm-eval's names of metrics


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe = "default",
    *,
    data: Text | Sequence[Text] | None = None,
    device: str = "auto",
    keep_work: bool = False,
    redo: bool = False,
    work: str | Path | None = None,
    allow_partial: bool = False,
    progress: Progress | Literal["auto"] | None = "auto",
    stop: Stop | None = None,
    **settings: Any,
) -> Manifest:
    """Quantise a causal LM into the directory `out`. The same call again resumes a run that was stopped.

    >>> manifest = upq.quantize("Qwen/Qwen3-0.6B", "qwen-2bit", data="text.txt", **{"distill.tokens": 1_000_000})
    >>> manifest.metrics["artifact"]["ppl"]

    model: directory or hub id of a Hugging Face model.
    out: directory of the artefact. It is new, or holds the same run.
    recipe: name of a recipe of the package, a YAML file, or a Recipe.
    data: text to learn from, in place of the recipe's: paths, hub data sets, or TextSource values.
    device: "auto", "cpu" or "cuda".
    keep_work: solved blocks and checkpoints stay on disk after the end.
    redo: do stages anew whose settings differ from those of the run in `out`. Without it, that is an error.
    work: directory in which several runs keep their stages and take one another's.
    allow_partial: less than 90 % of the decoder's weights may become codes. Without it, that is an error.
    progress: "auto" shows bars on a terminal and lines elsewhere, None nothing; or an object like upq.core.Progress.
    stop: a listener for signals (upq.core.signals). Without one, Ctrl-C interrupts at once; the same call resumes.
    settings: keys of the recipe with dots and their values, as `--set` of the command line.

    Returns the manifest: sizes, measures before and after, seconds by stage. Raises UPQError for bad input, with
    nothing changed; the message names place, value and remedy.
    """
    with loading(progress):
        chosen = recipe_of(recipe, settings, data)
        from upq.run.quiet import quietly
        from upq.run.run import quantize as run

    with quietly(), reporting(progress) as shown:
        return run(
            local_or_hub(model),
            chosen,
            local(out),
            device=device,
            keep_work=keep_work,
            redo=redo,
            work=None if work is None else local(work),
            allow_partial=allow_partial,
            progress=shown,
            stop=stop,
        )


def plan(
    model: str | Path,
    recipe: str | Path | Recipe = "default",
    *,
    memory: float | None = None,
    gpus: int = 0,
    gpu_memory: float | None = None,
    gpu_tflops: float | None = None,
    gpu_bandwidth: float | None = None,
    allow_partial: bool = False,
    progress: Literal["auto"] | None = "auto",
    **settings: Any,
) -> Plan:
    """What each stage of `quantize` will need, and the settings that make it fit.

    Of the model it reads config and tokenizer, no weights.

    >>> made = upq.plan("meta-llama/Llama-3.2-1B-Instruct", memory=16)
    >>> made.fits, made.settings, max(stage.memory for stage in made.stages)

    model, recipe, settings: as for `quantize`.
    memory: GB of the machine's memory; None: of this machine.
    gpus, gpu_memory: number of GPUs and GB of each; 0 GPUs plans for the processor.
    gpu_tflops, gpu_bandwidth: bf16 TFLOPS and GB/s that each GPU reaches; with both the plan has a time.
    allow_partial: as for `quantize`.
    progress: "auto" shows on a terminal that it is at work, None nothing.

    Returns the Plan: bytes, disk and seconds by stage, whether it fits, and the settings that it added to fit.
    Raises UPQError for bad input.
    """
    if bool(gpus) != (gpu_memory is not None):
        raise UPQError("--gpus and --gpu-memory go together: how many, and how much memory each has")
    if (gpu_tflops is None) != (gpu_bandwidth is None):
        raise UPQError("--gpu-tflops and --gpu-bandwidth go together; give both or neither")
    if not gpus and gpu_tflops is not None:
        raise UPQError("--gpu-tflops is of a GPU; give --gpus and --gpu-memory too")
    if gpus and memory is not None:
        raise UPQError("--memory is for a run on the processor; with --gpus give --gpu-memory alone")
    with loading(progress):
        chosen = recipe_of(recipe, settings)
        from upq.model.loading import load_config, load_tokenizer, tokenizer_directory
        from upq.run import plan as planning
        from upq.run.dry import check_text
        from upq.run.quiet import quietly
        from upq.text.tokenizer import tokenizer_files

    model = local_or_hub(model)
    with quietly(), loading(progress, "the model's config and tokenizer, then planning"):
        config = load_config(model)
        planning.check(config, chosen, str(model), allow_partial=allow_partial)
        folder = tokenizer_directory(model)
        if tokenizer_files(folder):  # a plan can be made of a config alone
            check_text(folder, config, load_tokenizer(model), chosen, str(model))
        return planning.plan(config, chosen, _machine(memory, gpus, gpu_memory, gpu_tflops, gpu_bandwidth))


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    separator: str = "none",
    seq_len: int | None = None,
    tasks: str | Sequence[str] = (),
    data_dir: str | Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    batch_size: int = 4,
    answers: str | Path | None = None,
    device: str = "auto",
    compute: str = "reference",
    progress: Progress | Literal["auto"] | None = "auto",
) -> Figures:
    """Measure a model on a text (perplexity, distance from a teacher), on tasks, or on both.

    >>> upq.evaluate("qwen-2bit", against="Qwen/Qwen3-0.6B", text="held-out.txt")["kld"]
    >>> upq.evaluate("qwen-2bit", tasks=["mmlu", "ifeval"], limit=100)["tasks"]["mmlu"]["acc"]

    model: directory or hub id, in full precision or packed. The files of an artefact are verified first.
    against: the teacher to compare with on `text`.
    text, separator, seq_len: a text file; "none" or "blank_line" between its documents; tokens a row (None: 2,048, or
        the model's context where that is shorter).
    tasks: names of lm-eval's tasks, as a list or separated by commas. Needs `pip install 'upq[eval]'`.
    data_dir: local files of mmlu, ifeval and the other tasks of docs/tasks.md, in place of the hub.
    fewshot, limit: examples before a question (None: as in lm-eval); questions of each task (None: all).
    samples, temperature: programs for each problem of humaneval or code, and how they are drawn (None: 0 for one, 0.2
        for several). These programs are run here (docs/tasks.md#programs).
    batch_size: rows or questions computed at a time.
    answers: a file that keeps the answers to tasks as they come; with the same file a run that was stopped goes on.
    device: "auto", "cpu" or "cuda".
    compute: products of a packed model: "reference" (exact), "w2a16" or "w2a8" (as in use on the CPU).
    progress: as for `quantize`, but on stderr.

    Returns the figures by name. Raises UPQError for bad input.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    file, folder, kept = (None if path is None else local(path) for path in (text, data_dir, answers))
    model, against = local_or_hub(model), None if against is None else local_or_hub(against)
    _check_request(file, names, against, separator, folder)

    with loading(progress):
        from upq import kernels
        from upq.core.precision import dtype_name
        from upq.data import load_eval_text
        from upq.evals import evaluate_tasks
        from upq.evals.code import Samples
        from upq.model.loading import context_of, embedding_rows, load_config, load_tokenizer
        from upq.run.quiet import quietly
        from upq.text.tokenizer import check_ids, check_tokens

    if compute not in kernels.COMPUTES:
        raise UPQError(f"--compute must be one of {', '.join(kernels.COMPUTES)}, got {compute!r}")
    target, drawn = device_of(device), Samples.of(samples, temperature)
    with quietly(), reporting(progress, stderr=True) as shown, kernels.computing(compute):
        kernels.compute(target)  # not every device has them all
        _verify(Path(model))
        config, tokenizer = load_config(model), load_tokenizer(model)
        check_ids(tokenizer, embedding_rows(config), str(model))
        if file is not None:
            length = seq_len or min(2048, context_of(config) or 2048)
            tokens_NT = load_eval_text(
                file, tokenizer, length, separator=cast("Literal['none', 'blank_line']", separator)
            )
            check_tokens(tokenizer, [int(tokens_NT.max())], embedding_rows(config), str(file))
        student, figures = _loaded(model, target, compute, shown)
        if file is not None:
            figures |= cast(Figures, _on_text(student, tokens_NT, against, batch_size, shown))
            figures["dtype"] = dtype_name(student.dtype)
        if names:
            shown.note(f"loading {', '.join(names)}")
            figures["tasks"] = evaluate_tasks(
                student,
                tokenizer,
                names,
                data_dir=folder,
                limit=limit,
                batch_size=batch_size,
                num_fewshot=fewshot,
                answers=kept,
                of=None if kept is None else _identity(model, student, compute),
                progress=shown,
                samples=drawn,
            )
    return figures


def export(
    artifact: str | Path,
    to: str,
    out: str | Path,
    *,
    allow_inexact: bool = False,
    progress: Progress | Literal["auto"] | None = "auto",
    **options: Any,
) -> Report:
    """Write an artefact for another engine, read it back as that engine does, and compare every weight.

    >>> upq.export("qwen-2bit", "gguf", "qwen.gguf").exact

    artifact: a finished artefact.
    to: the format: "gguf", "compressed-tensors", "dense" … (docs/engines.md).
    out: the file or directory to write. Nothing there is overwritten.
    allow_inexact: write it even where weights have to be rounded.
    progress: as for `quantize`.
    options: of the format, as `--set` of the command line.

    Returns the report, which is also written beside the export. Raises UPQError, with nothing written, for bad input
    and for a weight that does not read back as planned.
    """
    with loading(progress):
        from upq.exports import export as write
        from upq.run.quiet import quietly

    chosen = {**options, "allow_inexact": True} if allow_inexact else options
    with quietly(), reporting(progress) as shown:
        return write(local(artifact), to, local(out), options=chosen, progress=shown)


# --- arguments -----------------------------------------------------------------------------------------------------


def recipe_of(
    recipe: str | Path | Recipe, settings: Mapping[str, Any], data: Text | Sequence[Text] | None = None
) -> Recipe:
    """A recipe by name, file or value, with settings over it. `data`, where given, replaces its sources."""
    from upq.data.config import TextSource
    from upq.run.recipe import Recipe

    items = [_item(key, value) for key, value in settings.items()]
    if not isinstance(recipe, Recipe):
        chosen = Recipe.load(str(recipe), items)
    else:
        chosen = recipe.changed(items) if items else recipe
    given = [data] if isinstance(data, str | Path | TextSource) else list(data or ())
    if given:
        sources = tuple(text if isinstance(text, TextSource) else TextSource(path=str(text)) for text in given)
        chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"sources": sources})})
    for source in chosen.data.sources:
        if source.path.startswith((".", "/", "~")) and not local(source.path).exists():
            raise UPQError(f"--data {source.path}: no such file or directory")
    return chosen


def _item(key: str, value: Any) -> str:
    """`key=value` as `--set` takes it: JSON is YAML. So a value in Python passes the checks of the command line."""
    try:
        return f"{key}={json.dumps(value, ensure_ascii=False, default=_plain)}"
    except (TypeError, ValueError) as error:
        raise UPQError(f"setting {key}: {error}; give numbers, text, lists or mappings") from None


def _plain(value: object) -> object:
    from pydantic import BaseModel

    if isinstance(value, Path):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__name__} is no value of a recipe")


def _machine(
    memory: float | None,
    gpus: int,
    gpu_memory: float | None,
    gpu_tflops: float | None,
    gpu_bandwidth: float | None,
) -> Machine:
    import psutil

    from upq.run.plan import Machine, Speed, this_speed

    if gpu_memory is not None:
        speed = Speed(gpu_tflops * 1e12, gpu_bandwidth * 1e9) if gpu_tflops and gpu_bandwidth else None
        return Machine(int(gpu_memory * 1e9), gpus, speed)
    size = psutil.virtual_memory().total if memory is None else int(memory * 1e9)
    return Machine(size, speed=this_speed())


def _check_request(
    text: Path | None, names: list[str], against: str | Path | None, separator: str, data_dir: Path | None
) -> None:
    """Everything that can be wrong without a model, before one is loaded."""
    if text is None and not names:
        raise UPQError("nothing to measure: give --text FILE, --tasks mmlu,ifeval, or both")
    if text is not None and not text.is_file():
        raise UPQError(f"--text {text}: no such file")
    if against is not None and text is None:
        raise UPQError("--against compares on a text: give --text FILE as well")
    if separator not in ("none", "blank_line"):
        raise UPQError(f"--separator must be none or blank_line, got {separator!r}")
    if data_dir is not None and not data_dir.is_dir():
        raise UPQError(f"--data-dir {data_dir}: no such directory")


def device_of(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UPQError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UPQError("--device cuda: torch finds no CUDA device; use --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


# --- measuring -----------------------------------------------------------------------------------------------------


def _verify(model: Path) -> None:
    """Figures of a damaged file would be taken for the method's."""
    from upq.artifact.manifest import MANIFEST, read_manifest, verify

    if (model / MANIFEST).is_file():
        verify(model, read_manifest(model))


def _identity(model: str | Path, loaded: PreTrainedModel, compute: str) -> dict[str, str]:
    """What answers depend on beside their prompts; of the hub, the commit stands for the files."""
    from upq.core.precision import dtype_name
    from upq.files.digests import digest_model_dir

    files = digest_model_dir(Path(model)) if Path(model).is_dir() else f"{model}@{loaded.config._commit_hash}"
    return {"model": files, "dtype": dtype_name(loaded.dtype), "compute": compute}


def _loaded(model: str | Path, device: str, compute: str, progress: Progress) -> tuple[PreTrainedModel, Figures]:
    from upq.artifact.size import model_size, weights_bytes
    from upq.core.precision import dtype_name, to_compute_dtype
    from upq.model.loading import load_model

    progress.note(f"loading {model}")
    loaded = load_model(model, device=device)
    bits = model_size(loaded).bits_per_weight  # as it is stored
    loaded = to_compute_dtype(loaded)
    figures: Figures = {"bits_per_weight": bits, "bytes": weights_bytes(model), "dtype": dtype_name(loaded.dtype)}
    if getattr(loaded, "hf_quantizer", None) is not None:
        figures["compute"] = compute  # what the other figures are figures of
    return loaded, figures


def _on_text(
    student: PreTrainedModel, tokens_NT: Tensor, against: str | Path | None, batch_size: int, progress: Progress
) -> dict[str, Any]:
    """Figures by name. A float16 model that overflows is computed in float32, and stays there."""
    import torch

    from upq.core.precision import to_compute_dtype
    from upq.evals import evaluate_text
    from upq.evals.text import NotFinite
    from upq.model.loading import load_model

    teacher = None
    if against is not None:
        progress.note(f"loading {against}")
        teacher = to_compute_dtype(load_model(against, device=student.device.type))
    models = [student] if teacher is None else [student, teacher]
    progress.plan({"text": (len(tokens_NT), 1.0)})
    progress.start("text")
    try:
        measured = evaluate_text(student, tokens_NT, teacher=teacher, batch_size=batch_size, progress=progress)
    except NotFinite:
        if all(model.dtype != torch.float16 for model in models):
            raise
        progress.note("overflows in float16; computed in float32")
        progress.start("text")
        for model in models:
            model.to(torch.float32)  # type: ignore[arg-type]
        measured = evaluate_text(student, tokens_NT, teacher=teacher, batch_size=batch_size, progress=progress)
    return {key: value for key, value in dataclasses.asdict(measured).items() if value is not None}
