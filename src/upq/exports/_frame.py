"""What all exports go through: plan, write, read back, compare, and only then the final name."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from upq.artifact.manifest import MANIFEST
from upq.core.config import decode
from upq.core.errors import UPQError
from upq.core.precision import dtype_name
from upq.core.progress import Progress, Silent
from upq.exports._base import EXPORTS, Exporter, Plan, Rows
from upq.exports._report import REPORT, Carried, Report, read_report, report_path, write_report
from upq.exports._source import Source, Weight
from upq.files.atomic import write_errors, written
from upq.files.digests import digest_file
from upq.model.online import online

_FOLDER = "exports"  # of an artefact


def exporter(name: str, options: Mapping[str, Any] | None = None) -> Exporter:
    """The format `name` with its options decoded, its packages found."""
    cls = EXPORTS.get(name.replace("-", "_"))
    decoded = decode(cls.Config, dict(options or {}), f"export {name}")
    if missing := [package for package in cls.packages if _version(package) is None]:
        raise UPQError(f"export {name}: {missing[0]} is not installed; pip install {cls.install}")
    return cls(decoded)


def export(
    artifact: str | Path,
    name: str,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the artefact at `artifact` as `name` to `out`, prove it on the engine's reader and report.

    Nothing appears under the final name unless every weight reads back as planned: bit for bit, except those that
    `allow_inexact` let pass.
    """
    artifact, out, progress = Path(artifact), Path(out), progress or Silent()
    form = exporter(name, options)
    _check_target(out, form.suffix)
    source = form.view(Source.open(artifact))
    _check_forms(form, name, source)
    if turned := online(source.config):
        path = next(iter(turned))
        raise UPQError(
            f"{artifact}: {name} has no place for the rotation of a linear's input ({path}); leave the sites `down` and"
            " `inputs` out of the transform"
        )
    plan = form.plan(source)
    assert [p.weight.name for p in plan.placements] == list(source.weights)
    losses = {p.weight.name: p.loss for p in plan.placements if p.loss is not None}
    if losses and not form.options.allow_inexact:
        first, reason = next(iter(losses.items()))
        raise UPQError(
            f"{artifact}: {name} cannot hold {len(losses)} of {len(plan.placements)} weights exactly "
            f"({first}: {reason}); change its options, or accept the loss with --allow-inexact"
        )
    count = len(plan.placements)
    progress.plan({"write": (count, 1.0), "check": (count, 1.0)})
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with written(out) as scratch:
        progress.start("write")
        begun = time.monotonic()
        form.write(source, plan, scratch, progress)
        midway = time.monotonic()
        progress.start("check")
        carriers = _compare(form.read(source, plan, scratch), plan, out.name, progress)
        seconds = {"write": midway - begun, "check": time.monotonic() - midway}
        files = [file for file in scratch.rglob("*") if file.is_file()] if scratch.is_dir() else [scratch]
        linears = [p for p in plan.placements if p.weight.name in source.linears]
        report = Report(
            format=name,
            options=form.options.model_dump(),
            artifact=str(artifact),
            artifact_digest=digest_file(artifact / MANIFEST),
            exact=not losses,
            bytes=sum(file.stat().st_size for file in files),
            bits_per_weight=8 * sum(p.bytes for p in linears) / sum(p.weight.numel for p in linears),
            carriers=carriers,
            losses=losses,
            notes=[*plan.notes, *_not_carried(form, source)],
            engine={package: _version(package) or "?" for package in form.packages},
            checked=form.checked,
            compared_in=dtype_name(plan.compared_in),
            seconds={stage: round(taken, 3) for stage, taken in seconds.items()},
        )
        write_report(scratch / REPORT if form.suffix is None else out.with_suffix(f".{REPORT}"), report)
    return report


def ensure_export(
    artifact: str | Path, name: str, *, options: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> Path:
    """The export in its place below the artefact, `exports/NAME`; made unless it is there."""
    form, artifact, progress = exporter(name, options), Path(artifact), progress or Silent()
    out = artifact / _FOLDER / f"{name}{form.suffix or ''}"
    if not (out.exists() and report_path(out).is_file()):
        report = export(artifact, name, out, options=options)
        progress.note(f"{out}: {'exact' if report.exact else 'not exact'}, {report.bytes / 1e6:.1f} MB")
        return out
    found = read_report(report_path(out))
    if found.artifact_digest != digest_file(artifact / MANIFEST):
        raise UPQError(f"{out}: was made of another artefact; delete it first")
    if found.options != form.options.model_dump():
        raise UPQError(f"{out}: is there with other options; delete it first")
    return out


def _check_target(out: Path, suffix: str | None) -> None:
    """Nothing is ever overwritten: what is there may be an export that somebody uses."""
    if suffix is None:
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise UPQError(f"{out}: exists already; name a new directory, or delete it first")
    else:
        if out.suffix != suffix:
            raise UPQError(f"{out}: this format is one file; name it something{suffix}")
        if out.exists():
            raise UPQError(f"{out}: exists already; name a new file, or delete it first")


def _not_carried(form: Exporter, source: Source) -> list[str]:
    """What the artefact rounds beside its weights, and the engine does not."""
    lost = []
    if source.activations is not None and not form.carries(source.activations):
        lost.append(f"inputs of linears, which the artefact rounds to {source.activations}")
    if source.kv is not None:
        lost.append(f"keys and values, which the artefact rounds to {source.kv}")
    return [f"the weights alone are here, not the {' and the '.join(lost)}: the engine has its own"] if lost else []


_FORMS = {"expert": "experts", "stacked": "experts in one tensor", "transposed": "transposed linears"}


def _check_forms(form: Exporter, name: str, source: Source) -> None:
    """Refuse quantised weights that the format has no levels, scales or form for."""
    for weight in source.weights.values():
        if weight.scheme is not None and not form.holds(weight.scheme):
            kind = f"grid {weight.scheme.grid} with scales in {weight.scheme.scale_dtype}"
            raise UPQError(f"{source.path}: {name} cannot hold {kind} ({weight.name}); dense can")
        if weight.scheme is not None and weight.form not in form.forms:
            family, what = source.config.model_type, _FORMS[weight.form]
            raise UPQError(f"{source.path}: {family} has {what} ({weight.name}), which {name} cannot hold; dense can")


def _compare(read: Iterable[tuple[str, Rows]], plan: Plan, shown: str, progress: Progress) -> list[Carried]:
    """Each weight against the artefact; a weight that is not as planned is an error of what is `shown` to the user."""
    placements = {p.weight.name: p for p in plan.placements}
    sums: dict[str, list[float]] = {}  # carrier: largest error, squared error, squared norm
    for name, rows in read:
        placement = placements.pop(name, None)
        if placement is None:
            raise UPQError(f"{shown}: reads back a weight {name} that is not in the artefact; please report this")
        exact, found = _errors(placement.weight, rows, plan.compared_in)
        if placement.loss is None and not exact:
            raise UPQError(
                f"{shown}: {name} ({placement.carrier}) reads back wrong by up to {found[0]:.3g}; nothing was kept, "
                "please report this"
            )
        total = sums.setdefault(placement.carrier, [0.0, 0.0, 0.0])
        total[:] = [max(total[0], found[0]), total[1] + found[1], total[2] + found[2]]
        progress.advance(1)
    if placements:
        raise UPQError(f"{shown}: {next(iter(placements))} does not read back; nothing was kept, please report this")
    result = []
    for carrier, (largest, error, norm) in sums.items():
        held = [p for p in plan.placements if p.carrier == carrier]
        result.append(
            Carried(
                carrier=carrier,
                weights=len(held),
                numbers=sum(p.weight.numel for p in held),
                bytes=sum(p.bytes for p in held),
                max_error=largest,
                relative_error=(error / norm) ** 0.5 if norm else 0.0,
            )
        )
    return result


def _errors(weight: Weight, rows: Rows, dtype: torch.dtype) -> tuple[bool, list[float]]:
    """Whether all rows are equal, and the largest, the squared error and the squared norm."""
    exact, largest, error, norm = True, 0.0, 0.0, 0.0
    for start, stop in weight.chunks():
        want, got = weight.dequantize(start, stop).to(dtype).float(), rows(start, stop)
        if got.shape != want.shape or got.dtype != torch.float32:
            raise UPQError(f"{weight.name}: reads back as {got.dtype} {tuple(got.shape)}, not {tuple(want.shape)}")
        norm += want.square().sum(dtype=torch.float64).item()
        if not torch.equal(got, want):
            exact = False
            distance = (got - want).abs().nan_to_num(nan=math.inf)
            largest = max(largest, distance.max().item())
            error += distance.square().sum(dtype=torch.float64).item()
    return exact, [largest, error, norm]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
