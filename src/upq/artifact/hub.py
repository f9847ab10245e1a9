"""An artefact's way to the Hugging Face hub: what is uploaded, with which card, under which licence.

Laws (tests/test_cli_push.py): one commit holds everything or there is none; an upload that was interrupted goes on with
the files that the hub has not; nothing becomes public that was not asked to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.logging import set_verbosity_error

from upq.artifact.card import LICENCE, model_card, on_hub
from upq.artifact.licences import allows
from upq.artifact.manifest import MANIFEST, Manifest, read_manifest, verify
from upq.core.errors import UPQError
from upq.model.library import library_errors

CARD = "README.md"
_BESIDE = ("report.html",)
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "Notice*", "USE_POLICY*")
_KEYS = ("license", "license_name", "license_link")
_AGAIN = "; the same command goes on with what is not there yet"


@dataclass(frozen=True, slots=True)
class Licence:
    """The base model's, as the cards of the hub have it, and who says so."""

    fields: Mapping[str, str]  # of `_KEYS`
    where: str

    @property
    def name(self) -> str | None:
        """`license_name` where the hub's own list has no entry for it."""
        return self.fields.get("license_name") or self.fields.get("license")

    @property
    def allows(self) -> str:
        return allows(self.name)


@dataclass(frozen=True, slots=True)
class Upload:
    """What would be uploaded: by its path in the repository a file, or the card's text."""

    repo: str
    files: Mapping[str, Path | bytes]
    licence: Licence
    base: str | None  # a hub id

    def sizes(self) -> dict[str, int]:
        """Bytes by path."""
        return {
            name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in self.files.items()
        }


def prepare(directory: Path, repo: str, *, licence: str | None = None) -> Upload:
    """The finished artefact in `directory`, checked against its manifest, as it would stand in `repo` (USER/NAME).

    licence: its name where nothing says it.

    Raises UPQError. Asks the hub about the base model alone, and only where no card here says its licence.
    """
    manifest = read_manifest(directory)
    verify(directory, manifest)
    if repo.count("/") != 1:
        raise UPQError(f"push: repository {repo!r} is not USER/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UPQError(f"push: repository {repo!r}: {' '.join(str(error).split())}") from None
    source = Path(manifest.model.path).expanduser()
    files: dict[str, Path | bytes] = {}
    for folder in (source, directory):
        if folder.is_dir():
            found = (path for pattern in _LEGAL for path in folder.glob(pattern))
            files |= {path.name: path for path in sorted(found) if path.is_file()}
    files |= {name: directory / name for name in (*manifest.files, MANIFEST)}
    files |= {name: directory / name for name in _BESIDE if (directory / name).is_file()}
    given = {"license": licence} if licence else None
    held = Licence(given, "--licence") if given else _licence(directory, manifest)
    base = manifest.model.path if on_hub(manifest.model.path) and not source.exists() else None
    card = _card(directory, manifest, held, base).encode()
    return Upload(repo, dict(sorted({**files, CARD: card}.items())), held, base)


def _licence(directory: Path, manifest: Manifest) -> Licence:
    """That of the artefact's own card, the source's card beside its weights, or the source's card on the hub."""
    path = manifest.model.path
    for folder in (directory, Path(path).expanduser()):
        if (folder / CARD).is_file() and (fields := _fields(_read_card(folder / CARD).data)):
            return Licence(fields, str(folder / CARD))
    if on_hub(path) and not Path(path).expanduser().exists():
        try:
            fields = _fields(HfApi().model_info(path, timeout=10).card_data)
        except Exception as error:  # whatever the network does: a licence that is not known is no reason to stop
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return Licence({}, f"the hub does not say: {reason}")
        return Licence(fields, f"the card of {path} on the hub")
    return Licence({}, "no card says it")


def _fields(data: Any) -> dict[str, str]:
    found = {key: getattr(data, key, None) for key in _KEYS}
    return {key: str(value) for key, value in found.items() if value}


def _read_card(path: Path) -> ModelCard:
    with library_errors(f"{path}: its header is not read", "; correct it or delete the file"):
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)


def _card(directory: Path, manifest: Manifest, licence: Licence, base: str | None) -> str:
    """The artefact's card as it stands, people's changes included, with what the hub shows in its header."""
    path = directory / CARD
    card = _read_card(path) if path.is_file() else ModelCard(model_card(manifest))
    data: Any = card.data
    for key, value in licence.fields.items():
        setattr(data, key, value)
    if base and not data.base_model:
        data.base_model = base
    if data.base_model:
        data.base_model_relation = "quantized"
    bits = sorted({f"{layer.bits}-bit" for layer in manifest.layers})
    data.tags = list(dict.fromkeys([*(data.tags or []), "upq", *bits]))
    card.text = (
        card.text.replace(LICENCE, f"{LICENCE}\n\n{licence.allows}") if licence.allows not in card.text else card.text
    )
    return str(card)


# --- on the hub ----------------------------------------------------------------------------------------------------


def publish_on_hub(upload: Upload, *, public: bool = False) -> str:
    """Create the repository where it is not there, and upload in one commit. Returns its address. Raises UPQError."""
    token = get_token()
    if token is None:
        raise UPQError("push: no token for the hub; log in first: hf auth login (or set HF_TOKEN)")
    api = HfApi(token=token)
    set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns where nothing has changed
    with _hub_errors(upload.repo):
        try:
            private = api.model_info(upload.repo).private
        except RepositoryNotFoundError:
            private = None
        if private is False and not public:
            raise UPQError(f"push: {upload.repo} is there and public; --public agrees, or make it private on its page")
        if private and public:
            raise UPQError(
                f"push: {upload.repo} is there and private; leave --public out, or make it public on its page"
            )
        where = api.create_repo(upload.repo, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, what) for name, what in upload.files.items()]
        api.create_commit(upload.repo, operations, commit_message="Upload with upq push")
    return str(where)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    with library_errors(f"push: {repo}", _AGAIN):
        try:
            yield
        except Exception as error:
            found: BaseException = error
            while not isinstance(found, HfHubHTTPError) and found.__cause__ is not None:  # in a RuntimeError
                found = found.__cause__
            status = found.response.status_code if isinstance(found, HfHubHTTPError) else None
            if status == 401:
                raise UPQError("push: the hub does not know this token; log in again: hf auth login") from error
            if status == 403:
                raise UPQError(
                    f"push: the hub refuses {repo} to this token; take one that may write there: hf auth login"
                ) from error
            if found is error:
                raise
            raise found from error
