"""Bundles: a versioned folder with every model a run needs.

::

    <bundle>/bundle.json     name, version, the pieces, the SHA-256 of every file
    <bundle>/README.md       the card: data, licence, figures, limits
    <bundle>/clip/           open_clip folder                          required
    <bundle>/dinov2/         transformers folder                       required
    <bundle>/scorer/         LightGBM text model and its spec          \\  both, or
    <bundle>/attributes/     head as safetensors and its spec          /  zero_shot
    <bundle>/zero_shot/      embedded antonym prompts
    <bundle>/captioner/      SmolVLM as a transformers folder          optional

Weights are safetensors or LightGBM text only, and a piece's hashes are checked before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from picinspector.errors import BundleError
from picinspector.preprocess import CAPTIONER_SPEC
from picinspector.zeroshot import write_prompts

MANIFEST = "bundle.json"
PIECES = ("clip", "dinov2", "scorer", "attributes", "zero_shot", "captioner")

#: Raise when a change of code changes what decode, crop, measure or encode give for the same bytes and weights.
ENCODE_VERSION = 2
#: Raise when a change of code changes scores for the same embeddings and models.
SCORE_VERSION = 3
#: Raise when a change of code changes captions for the same photos and models.
CAPTION_VERSION = 1

_PACKAGED = Path(__file__).parent / "bundles"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its description read, its weights not yet.

    Attributes:
        folder: where it is on this machine.
        name, version: from `bundle.json`.
        files: relative path -> SHA-256, every file but `bundle.json`.
    """

    folder: Path
    name: str
    version: str
    files: dict[str, str] = field(repr=False)

    def has(self, piece: str) -> bool:
        """True if the bundle holds this one of `PIECES`."""
        return any(path.startswith(f"{piece}/") for path in self.files)

    def piece(self, piece: str) -> Path:
        """The folder of a piece, its hashes checked.

        Raises:
            BundleError: the piece is absent, or a file of it is missing or damaged.
        """
        if not self.has(piece):
            raise BundleError(f"bundle {self.name} at {self.folder} has no {piece}; it holds {self.pieces}")
        self._check(path for path in self.files if path.startswith(f"{piece}/"))
        return self.folder / piece

    @property
    def pieces(self) -> list[str]:
        """The pieces this bundle holds."""
        return [piece for piece in PIECES if self.has(piece)]

    @property
    def scorer_kind(self) -> str:
        """`lightgbm`, or `zero_shot` where no scorer has been trained."""
        return "lightgbm" if self.has("scorer") else "zero_shot"

    @property
    def encoder_fingerprint(self) -> str:
        """Hash of all that determines an embeddings row: encoder weights, their preprocessing, `ENCODE_VERSION`.

        Precision (bfloat16 or float32) is left out on purpose: a cluster may mix hosts. It moves embeddings of
        transformers by less than 0.001 in cosine; of the builtin bundle's convolutional tower more, see its card.
        """
        return self._fingerprint(("clip", "dinov2"), f"encode {ENCODE_VERSION}")

    @property
    def scorer_fingerprint(self) -> str:
        """Hash of all that determines a scores row: the scoring models, what they were fed, `SCORE_VERSION`."""
        pieces = ("scorer", "attributes") if self.has("scorer") else ("zero_shot",)
        return self._fingerprint(pieces, f"score {SCORE_VERSION} {self.encoder_fingerprint}")

    @property
    def caption_fingerprint(self) -> str:
        """Hash of all that determines a caption: the captioner, the heads it is held against, `CAPTION_VERSION`."""
        pieces = ("captioner", "attributes")
        return self._fingerprint(pieces, f"caption {CAPTION_VERSION} {self.encoder_fingerprint}")

    def _fingerprint(self, pieces: tuple[str, ...], code: str) -> str:
        parts = sorted(f"{path} {digest}" for path, digest in self.files.items() if path.split("/")[0] in pieces)
        return hashlib.sha256("\n".join([code, *parts]).encode()).hexdigest()[:16]

    def expect(self, encoder: str | None = None, scorer: str | None = None, caption: str | None = None) -> None:
        """Check the fingerprints against those of the machine that planned the run; None takes any.

        Raises:
            BundleError: this node has another bundle under the same name.
        """
        for wanted, found in (
            (encoder, self.encoder_fingerprint),
            (scorer, self.scorer_fingerprint),
            (caption, self.caption_fingerprint),
        ):
            if wanted is not None and wanted != found:
                raise BundleError(
                    f"{self.folder} on this node has fingerprint {found}, the run was planned with {wanted}: install "
                    "the same picinspector and the same bundle on every node"
                )

    def verify(self) -> None:
        """Check every file.

        Raises:
            BundleError: a file is missing or damaged, or one is there that `bundle.json` does not name.
        """
        self._check(self.files)
        strangers = set(_list_files(self.folder)) - set(self.files)
        if strangers:
            raise BundleError(f"{self.folder}: {min(strangers)} is not named in {MANIFEST}; remove it")

    def _check(self, paths: Any) -> None:
        for path in paths:
            target = self.folder / path
            try:
                digest = _sha256(target)
            except OSError as error:
                raise BundleError(f"{target}: cannot be read ({error.strerror}); fetch the bundle again") from error
            if digest != self.files[path]:
                found = f"SHA-256 {digest[:12]}…, expected {self.files[path][:12]}…"
                raise BundleError(f"{target} is damaged: {found}; fetch the bundle again")


def open_bundle(ref: str | os.PathLike[str] = "builtin") -> Bundle:
    """Open a bundle by name (`builtin`, `full`) or by folder.

    Raises:
        BundleError: there is none, or its description is unusable.
    """
    if os.fspath(ref) == "full":
        folder = fetched_folder()
        advice = "run `picinspector bundle fetch full` on every node, or give the folder of a shared copy"
    else:
        folder = _PACKAGED / "builtin" if os.fspath(ref) == "builtin" else Path(ref)
        advice = "give `builtin`, `full` or a bundle's folder"
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"no bundle at {folder} ({MANIFEST} is missing): {advice}")
    try:
        content = json.loads(path.read_text("utf-8"))
        bundle = Bundle(folder, str(content["name"]), str(content["version"]), dict(content["files"]))
        unknown = content["format"] != 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: not a readable bundle description ({error!r}); fetch the bundle again") from error
    if unknown:
        raise BundleError(f"{path}: format {content['format']}, this version reads 1; upgrade picinspector")
    if not (bundle.has("clip") and bundle.has("dinov2")):
        raise BundleError(f"{folder}: a bundle needs clip and dinov2, this one holds {bundle.pieces}")
    if not (bundle.has("zero_shot") or (bundle.has("scorer") and bundle.has("attributes"))):
        raise BundleError(f"{folder}: a bundle needs scorer and attributes, or zero_shot; it holds {bundle.pieces}")
    return bundle


def seal(folder: str | os.PathLike[str], name: str, version: str) -> Bundle:
    """Write `bundle.json` for a folder whose pieces are in place, with the hash of every file."""
    root = Path(folder)
    files = {path: _sha256(root / path) for path in _list_files(root)}
    content = {"format": 1, "name": name, "version": version, "files": files}
    temporary = root / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    temporary.replace(root / MANIFEST)
    return open_bundle(root)


def fetched_folder() -> Path:
    """Where `fetch_full` puts the full bundle by default."""
    base = os.environ.get("PICINSPECTOR_CACHE") or Path.home() / ".cache" / "picinspector"
    return Path(base) / f"full-{_full_recipe()['version']}"


def fetch_full(
    folder: str | os.PathLike[str] | None = None,
    clip: str | os.PathLike[str] | None = None,
    dinov2: str | os.PathLike[str] | None = None,
    captioner: str | os.PathLike[str] | None = None,
    captions: bool = True,
) -> Bundle:
    """Put the full bundle together: CLIP ViT-L/14, DINOv2-base, SmolVLM; zero-shot prompts until a scorer is trained.

    Args:
        folder: where to; default `fetched_folder()`. A bundle that is there is replaced.
        captions: whether with the captioner.
        clip, dinov2, captioner: local folders in the published formats, instead of the Hugging Face hub at pinned
            revisions.

    Raises:
        BundleError: a file cannot be had, or the folder holds something else.
    """
    recipe = _full_recipe()
    target = Path(folder) if folder else fetched_folder()
    if target.exists() and not (target / MANIFEST).is_file() and (target.is_file() or any(target.iterdir())):
        raise BundleError(f"{target} exists and is not a bundle; give a new or an empty folder")
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        wanted = {"clip": clip, "dinov2": dinov2} | ({"captioner": captioner} if captions else {})
        for piece, local in wanted.items():
            _gather(recipe[piece], Path(local) if local else None, building / piece)
        if captions:
            spec = json.dumps(recipe["captioner"]["spec"], indent=2) + "\n"
            (building / "captioner" / CAPTIONER_SPEC).write_text(spec, "utf-8")
        write_prompts(building / "clip", building / "zero_shot")
        shutil.copyfile(_PACKAGED / "full" / "README.md", building / "README.md")
        seal(building, "full", recipe["version"])
        if target.exists():
            shutil.rmtree(target)
        building.replace(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return open_bundle(target)


def _full_recipe() -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((_PACKAGED / "full" / "recipe.json").read_text("utf-8"))
    return recipe


def _gather(source: dict[str, Any], local: Path | None, target: Path) -> None:
    target.mkdir(parents=True)
    for name in source["files"]:
        if local is not None:
            origin = local / name
            if not origin.is_file():
                raise BundleError(f"{origin} is missing; expected {source['files']} as published in {source['hub']}")
        else:
            origin = _download(source["hub"], source["revision"], name)
        shutil.copyfile(origin, target / name)


def _download(hub: str, revision: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub, name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BundleError(
            f"cannot download {name} of {hub} from the Hugging Face hub ({type(error).__name__}); check the network, "
            "or give local copies: picinspector bundle fetch full --clip FOLDER --dinov2 FOLDER --captioner FOLDER"
        ) from error


def _list_files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(str(path.relative_to(folder).as_posix()) for path in paths if path != folder / MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
