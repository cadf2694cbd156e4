"""`package`: several models in one static archive, and the folder of an app that goes with it.

    dist/lib/libmodel_iphone.a       every model's library, each under a prefix of its own
    dist/bundle/mlc-app-config.json  which library each model takes, and the memory it needs
    dist/bundle/MODEL_ID/            parameters, configuration and tokenizer of a bundled model

The input, mlc-package-config.json, and both outputs have the format of MLC-LLM's `mlc_llm package`.
What differs: models are local directories, `estimated_vram_bytes` is computed (a given number is
only compared), the context is lowered to one that fits the budget unless `overrides` gives it, and
`model_url` may say where an app fetches weights that are not bundled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_compile.chat_config import COMPILE_KEYS
from mlc_compile.compiler.build import check_inputs, compile_library, library_prefix
from mlc_compile.compiler.fit import largest_context
from mlc_compile.compiler.inputs import CompileInputs, load_inputs
from mlc_compile.compiler.memory import format_bytes
from mlc_compile.compiler.opt import parse_opt
from mlc_compile.compiler.tvm_pair import require_tvm
from mlc_compile.config import ConfigReader, read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.manifest import MANIFEST, parameter_schema_id, read_manifest
from mlc_compile.models.structure import check_allowed
from mlc_compile.quantization.policy import stored_params
from mlc_compile.targets.apple.phones import PHONES
from mlc_compile.targets.apple.prefix import check_distinct, check_prefix, model_lib_of, prefix_of
from mlc_compile.targets.profile import TARGETS, TargetProfile
from mlc_compile.weights.publish import cannot_write

Progress = Callable[[str, int, int], None]

CONFIG_NAME = "mlc-package-config.json"
APP_CONFIG = "mlc-app-config.json"
LIBRARY = "libmodel_iphone.a"  # MLC's name on every Apple platform
DEFAULT_PHONE = "iphone-6gb"

_LIBRARY_SUFFIXES = {".so", ".dylib", ".dll", ".a", ".tar", ".wasm"}
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ENTRY_KEYS = {
    "model",
    "model_id",
    "model_lib",
    "model_url",
    "estimated_vram_bytes",
    "bundle_weight",
    "overrides",
}
_TOP_KEYS = {"device", "model_list", "model_lib_path_for_prepare_libs"}


@dataclass(frozen=True)
class Entry:
    """One model of mlc-package-config.json. `where` names it in errors."""

    where: str
    source: Path
    model_id: str
    model_lib: str | None
    model_url: str | None
    estimated: int | None
    bundle: bool
    overrides: Mapping[str, int]


@dataclass(frozen=True)
class PackageConfig:
    """A checked mlc-package-config.json. libraries: model_lib -> a .tar made by `compile`."""

    profile: TargetProfile
    entries: tuple[Entry, ...]
    libraries: Mapping[str, Path]


@dataclass(frozen=True)
class PackagedModel:
    """A model as the app finds it. vram: bytes that the compiler planned."""

    model_id: str
    model_lib: str
    vram: int
    context: int
    bundled: int | None  # bytes; None: not bundled


@dataclass(frozen=True)
class PackageReport:
    """What was made."""

    library: Path
    app_config: Path
    nbytes: int
    seconds: float
    models: tuple[PackagedModel, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "library": str(self.library),
            "app_config": str(self.app_config),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 2),
            "models": [
                {
                    "model_id": m.model_id,
                    "model_lib": m.model_lib,
                    "estimated_vram_bytes": m.vram,
                    "context": m.context,
                    "bundled_bytes": m.bundled,
                }
                for m in self.models
            ],
        }

    def to_text(self) -> str:
        count = len({m.model_lib for m in self.models})
        lines = [
            f"{self.library}: {format_bytes(self.nbytes)}, {count} "
            f"{'library' if count == 1 else 'libraries'}, {self.seconds:.1f} s",
            f"{self.app_config}:",
        ]
        for m in self.models:
            weights = "not bundled" if m.bundled is None else f"{format_bytes(m.bundled)} bundled"
            lines.append(
                f"  {m.model_id}: {m.model_lib}, {m.context} tokens, "
                f"{format_bytes(m.vram)} when it runs, {weights}"
            )
        return "\n".join(lines)


def read_package_config(path: Path) -> PackageConfig:
    """Read mlc-package-config.json; paths in it are relative to its folder.

    Raises:
        InputError: not such a file, an unknown key, a model that is not here.
    """
    if path.is_dir():
        path = path / CONFIG_NAME
    raw = read_json_strict(path)
    _known(raw, _TOP_KEYS, str(path))
    reader = ConfigReader(raw, where=str(path))
    device = reader.optional_text("device")
    devices = [name for name, profile in TARGETS.items() if profile.static_suffixes]
    if device not in devices:
        raise InputError(
            f"{path}: device is {device!r}, and libraries that an app links are made for "
            f"{', '.join(devices)}"
        )
    entries = raw.get("model_list")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: model_list must be a list of at least one model")
    libraries = reader.optional_object("model_lib_path_for_prepare_libs") or {}
    found = {}
    for name, library in libraries.items():
        if not isinstance(library, str) or not (path.parent / library).is_file():
            raise InputError(
                f"{path}: model_lib_path_for_prepare_libs: {name}: there is no file {library!r}",
                hint="leave it out and the library is compiled",
            )
        found[name] = path.parent / library
    read = tuple(_read_entry(entry, number, path) for number, entry in enumerate(entries))
    ids = [entry.model_id for entry in read]
    repeated = sorted({name for name in ids if ids.count(name) > 1})
    if repeated:
        raise InputError(f"{path}: two models have the model_id {repeated[0]!r}")
    unused = sorted(found.keys() - {entry.model_lib for entry in read})
    if unused:
        raise InputError(
            f"{path}: model_lib_path_for_prepare_libs has {unused[0]!r}, which is no model's "
            "model_lib"
        )
    return PackageConfig(TARGETS[device], read, found)


def _known(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(raw.keys() - known)
    if unknown:
        raise InputError(
            f"{where}: unknown key {unknown[0]!r}", hint=f"known: {', '.join(sorted(known))}"
        )


def _read_entry(raw: Any, number: int, path: Path) -> Entry:
    where = f"{path}: model_list[{number}]"
    if not isinstance(raw, dict):
        raise InputError(f"{where} must be an object")
    _known(raw, _ENTRY_KEYS, where)
    reader = ConfigReader(raw, where=where, prefix="")
    texts = {key: reader.optional_text(key) for key in ("model", "model_id", "model_lib")}
    model, model_id = texts["model"], texts["model_id"]
    if not model or not model_id:
        raise InputError(f"{where} needs both model and model_id")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", model_id):
        raise InputError(
            f"{where}: model_id {model_id!r} becomes a folder's name and may hold only letters, "
            "digits and . _ + -"
        )
    if model_id == APP_CONFIG:
        raise InputError(f"{where}: model_id {model_id!r} is the name of the app's configuration")
    if _REMOTE.match(model):
        raise InputError(
            f"{where}: model {model!r} is remote, and this tool reads local directories only",
            hint="download it, or make it with convert_weight and gen_config, and name the "
            "directory",
        )
    overrides = reader.optional_object("overrides") or {}
    for key, value in overrides.items():
        if key not in COMPILE_KEYS or type(value) is not int:
            raise InputError(
                f"{where}: overrides: {key} = {value!r} is no size in whole numbers",
                hint=f"known: {', '.join(COMPILE_KEYS)}",
            )
    url, bundle = reader.optional_text("model_url"), reader.flag("bundle_weight")
    if url is not None and not url.startswith("https://"):
        raise InputError(f"{where}: model_url {url!r} does not begin with https://")
    if bundle == (url is not None):
        raise InputError(
            f"{where}: an app finds the weights of {model_id} in its bundle or at an address",
            hint='set "bundle_weight": true, or give "model_url" (not both)',
        )
    return Entry(
        where=where,
        source=path.parent / model,
        model_id=model_id,
        model_lib=texts["model_lib"],
        model_url=url,
        estimated=reader.optional_integer("estimated_vram_bytes", high=1 << 50),
        bundle=bundle,
        overrides=dict(overrides),
    )


@dataclass(frozen=True)
class _Job:
    """What is to be done for one entry. identity: equal for libraries that are the same."""

    entry: Entry
    inputs: CompileInputs
    overrides: Mapping[str, int]
    prefix: str
    identity: str
    library: Path | None
    notes: tuple[str, ...]


def package(
    config_path: Path,
    output: Path,
    *,
    budget: int | None = None,
    opt: str = "O2",
    allow_experimental: bool = False,
    progress: Progress | None = None,
) -> PackageReport:
    """Compile every model of `config_path` and write `output`/lib and `output`/bundle.

    budget: bytes that each model's plan must fit in; None is DEFAULT_PHONE's for an iPhone and
    none elsewhere. allow_experimental: as for `compile_library`. Everything is made beside
    `output` first and moved there at the end, the app's configuration last. Other files in
    `output` stay; folders of models that the previous configuration bundled do not. Same inputs
    give the same bytes.

    Raises:
        InputError: a bad configuration, a model that does not fit, parameters that are not those
            of the library, two models with clashing prefixes. All before the first compilation.
        EnvironmentLacksError: TVM's pair or ziglang is missing.
        CheckFailedError: a library would not link or load.
    """
    started = time.monotonic()
    config = read_package_config(config_path)
    if budget is None and config.profile.name == "iphone":
        budget = PHONES[DEFAULT_PHONE].budget
    jobs = [_prepare(entry, config, budget, opt) for entry in config.entries]
    for job in jobs:
        check_allowed(job.inputs.model, allow_experimental, where=str(job.entry.source))
    _check_prefixes(jobs)
    require_tvm()
    config.profile.backend().check_environment(".a", "zig")
    with _staging(output) as staging:
        built = _libraries(jobs, config.profile, staging, budget, opt, progress)
        return _assemble(jobs, built, config.profile, staging, output, started)


def _prepare(entry: Entry, config: PackageConfig, budget: int | None, opt: str) -> _Job:
    """Everything about an entry that can be known without compiling."""
    profile = config.profile
    overrides = dict(entry.overrides)
    inputs = load_inputs(entry.source, profile, overrides)
    notes = [f"{entry.model_id}: {note}" for note in inputs.config.notes]
    library = config.libraries.get(entry.model_lib or "")
    windows = {"context_window_size", "sliding_window_size"}
    if budget is not None and not windows & overrides.keys() and library is None:
        fitting = largest_context(inputs, profile, budget)
        own = inputs.config
        if fitting is not None and own.sliding_window_size < 0:
            context = fitting.context_window_size
            if 0 < context < own.context_window_size:
                overrides["context_window_size"] = context
                inputs = load_inputs(entry.source, profile, overrides)
                notes.append(
                    f"{entry.model_id}: context_window_size is {context}, not the configuration's "
                    f"{own.context_window_size}: the largest that fits {format_bytes(budget)}; "
                    "overrides changes it."
                )
    plan = check_inputs(inputs, profile, budget)
    if entry.estimated is not None and entry.estimated < plan.total:
        notes.append(
            f"{entry.model_id}: estimated_vram_bytes is {entry.estimated} in the file and "
            f"{plan.total} by the plan, which is written."
        )
    derived = library_prefix(inputs, profile, ".a", parse_opt(opt), None)
    prefix = derived
    if entry.model_lib is not None:
        prefix = check_prefix(prefix_of(entry.model_lib), f"{entry.where}: the prefix of model_lib")
    _check_parameters(entry, inputs)
    return _Job(
        entry=entry,
        inputs=inputs,
        overrides=overrides,
        prefix=prefix,
        identity=f"{derived} {library}",
        library=library,
        notes=tuple(notes),
    )


def _check_parameters(entry: Entry, inputs: CompileInputs) -> None:
    """The directory holds whole parameters, and those that the library will ask for."""
    manifest = read_manifest(entry.source)
    wanted = parameter_schema_id(
        [s for spec in inputs.model.parameters() for s in stored_params(spec, inputs.scheme)]
    )
    if manifest.get("parameter_schema_id") != wanted:
        raise InputError(
            f"{entry.where}: the parameters in {entry.source} are not those of its configuration",
            hint="run convert_weight and gen_config with the same --quantization and --override",
        )
    for file in manifest["files"]:
        path = entry.source / file["name"]
        if not path.is_file() or path.stat().st_size != file["nbytes"]:
            raise InputError(
                f"{path} is missing or has another size than {MANIFEST} says",
                hint="run convert_weight again",
            )


def _check_prefixes(jobs: Sequence[_Job]) -> None:
    """Models with the same library share it; any other pair must have distinct symbols."""
    owners: dict[str, _Job] = {}
    for job in jobs:
        first = owners.setdefault(job.prefix, job)
        if first.identity != job.identity:
            raise InputError(
                f"{first.entry.model_id} and {job.entry.model_id} both have the model_lib "
                f"{model_lib_of(job.prefix)!r}, and their libraries differ",
                hint="give each a model_lib of its own, or leave it out",
            )
    check_distinct([(job.entry.model_id, prefix) for prefix, job in owners.items()])


@dataclass(frozen=True)
class _Library:
    """Objects of one library, and the bytes of device memory that its plan needs."""

    members: list[tuple[str, bytes]]
    vram: int
    context: int


def _libraries(
    jobs: Sequence[_Job],
    profile: TargetProfile,
    staging: Path,
    budget: int | None,
    opt: str,
    progress: Progress | None,
) -> dict[str, _Library]:
    """The library of each prefix, compiled or given."""
    from mlc_compile.targets.apple.tools import read_tar

    distinct = {job.prefix: job for job in reversed(jobs)}
    ordered = [job for job in jobs if distinct[job.prefix] is job]
    built = {}
    for number, job in enumerate(ordered):
        if job.library is not None:
            built[job.prefix] = _given_library(job, profile)
            continue

        def report(step: str, done: int, total: int, job: _Job = job, number: int = number) -> None:
            if progress is not None:
                label = f"{job.entry.model_id}: {step}"
                progress(label, number * total + done, total * len(ordered))

        path = staging / f"{job.prefix}.tar"
        made = compile_library(
            job.entry.source,
            profile.name,
            path,
            opt=opt,
            overrides=job.overrides,
            budget=budget,
            system_lib_prefix=job.prefix,
            allow_experimental=True,  # checked for all models at once
            progress=report,
        )
        built[job.prefix] = _Library(read_tar(path), made.plan.total, job.inputs.config.kv_tokens)
        path.unlink()
    return built


def _given_library(job: _Job, profile: TargetProfile) -> _Library:
    """A library of model_lib_path_for_prepare_libs.

    Raises:
        InputError: it is not one of ours for this device, this model and this name.
    """
    from mlc_compile.targets.apple.tools import read_tar
    from mlc_compile.targets.embedded import read_metadata

    assert job.library is not None
    metadata = read_metadata(job.library)
    ours = metadata["mlc_compile"]
    for what, found, wanted in (
        ("target", ours.get("target"), profile.name),
        ("system-library prefix", ours.get("system_lib_prefix"), job.prefix),
        (
            "list of parameters",
            ours.get("parameter_schema_id"),
            read_manifest(job.entry.source).get("parameter_schema_id"),
        ),
    ):
        if found != wanted:
            raise InputError(
                f"{job.library}: its {what} is {found}, and {job.entry.model_id} needs {wanted}",
                hint="leave it out of model_lib_path_for_prepare_libs and it is compiled",
            )
    if job.library.suffix != ".tar":
        raise InputError(f"{job.library}: give the .tar that `compile -o NAME.tar` writes")
    members = read_tar(job.library)
    return _Library(members, int(ours["memory_plan"]["total"]), int(ours["kv_tokens"]))


def _assemble(
    jobs: Sequence[_Job],
    built: Mapping[str, _Library],
    profile: TargetProfile,
    staging: Path,
    output: Path,
    started: float,
) -> PackageReport:
    """Write the archive and the bundle into the staging folder, then move them to their places."""
    from mlc_compile.targets.apple.check import check_objects
    from mlc_compile.targets.apple.export import write_static
    from mlc_compile.targets.apple.platforms import PLATFORMS

    members = [member for library in built.values() for member in library.members]
    check_objects(members, PLATFORMS[profile.name])
    new = staging / "new"
    (new / "lib").mkdir(parents=True)
    (new / "bundle").mkdir()
    write_static(members, new / "lib" / LIBRARY)
    records, models, names = [], [], []
    for job in jobs:
        entry, library = job.entry, built[job.prefix]
        bundled = None
        if entry.bundle:
            bundled = _bundle(entry.source, new / "bundle" / entry.model_id)
            names.append(entry.model_id)
        record: dict[str, Any] = {
            "model_id": entry.model_id,
            "model_lib": entry.model_lib or model_lib_of(job.prefix),
            "estimated_vram_bytes": library.vram,
        }
        record |= {"model_path": entry.model_id} if entry.bundle else {"model_url": entry.model_url}
        records.append(record)
        models.append(
            PackagedModel(
                entry.model_id, record["model_lib"], library.vram, library.context, bundled
            )
        )
    text = json.dumps({"model_list": records}, indent=2) + "\n"
    (new / "bundle" / APP_CONFIG).write_text(text, encoding="utf-8")
    nbytes = (new / "lib" / LIBRARY).stat().st_size
    _publish(staging, output, names)
    return PackageReport(
        library=output / "lib" / LIBRARY,
        app_config=output / "bundle" / APP_CONFIG,
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        models=tuple(models),
        notes=tuple(note for job in jobs for note in job.notes),
    )


def _bundle(source: Path, target: Path) -> int:
    """Link (or, across file systems, copy) the files of a model directory, libraries left out;
    their bytes."""
    target.mkdir()
    total = 0
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix in _LIBRARY_SUFFIXES:
            continue
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)
        total += path.stat().st_size
    return total


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A hidden folder in `output`, which is made if need be; unmade when nothing came of it."""
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".mlc_compile.", dir=output))
    except OSError as error:
        raise cannot_write(output, error) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made and not any(output.iterdir()):
            output.rmdir()


def _publish(staging: Path, output: Path, names: Sequence[str]) -> None:
    """Move what is new into its place and what it replaces out of it; undone when a move fails.

    The app's configuration leaves first and comes last: with it there, all is there.
    """
    new, old = staging / "new", staging / "old"
    stale = sorted({*_bundled_before(output / "bundle" / APP_CONFIG), *names})
    leaving = [f"bundle/{name}" for name in (APP_CONFIG, *stale)] + [f"lib/{LIBRARY}"]
    coming = [f"lib/{LIBRARY}", *(f"bundle/{name}" for name in (*names, APP_CONFIG))]
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        moved.append((source, target))

    try:
        for name in leaving:
            if (output / name).exists():
                move(output / name, old / name)
        for name in coming:
            move(new / name, output / name)
    except BaseException as error:  # Ctrl-C too
        for source, target in reversed(moved):
            os.replace(target, source)
        if isinstance(error, OSError):
            raise cannot_write(output, error) from error
        raise


def _bundled_before(app_config: Path) -> list[str]:
    """Folders that the configuration of an earlier run names, if there is one that can be read."""
    try:
        records = json.loads(app_config.read_text(encoding="utf-8"))["model_list"]
        paths = [record.get("model_path") for record in records]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [
        path
        for path in paths
        if isinstance(path, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", path)
    ]
