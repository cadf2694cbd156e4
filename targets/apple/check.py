"""What a library for an Apple platform must be, checked on its bytes before anybody sees it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mlc_compile.errors import CheckFailedError
from mlc_compile.targets.apple import macho
from mlc_compile.targets.apple.platforms import ApplePlatform
from mlc_compile.targets.apple.tools import Member
from mlc_compile.targets.embedded import find_metadata

RUNTIME_SYMBOLS = frozenset(
    {
        "_TVMFFIEnvModLookupFromImports",
        "_TVMFFIEnvModRegisterSystemLibSymbol",
        "_TVMFFIErrorSetRaisedFromCStrParts",
        "_TVMFFIFunctionCall",
        "_TVMFFIHandleInitOnce",
        # device memory of a kernel that is several launches
        "_TVMBackendAllocWorkspace",
        "_TVMBackendFreeWorkspace",
    }
)
"""What the TVM runtime inside an app provides (tvm/ffi/c_api.h, tvm/ffi/extra/c_env_api.h,
tvm/runtime/c_backend_api.h)."""
SYSTEM_SYMBOLS = frozenset({"_memcpy", "_memmove", "_memset", "_bzero"})
"""What libSystem provides, on every platform and for ever."""
_LINKED_SYMBOLS = frozenset({"dyld_stub_binder", "___extendhfsf2", "___truncsfhf2"})
"""What libSystem provides beside these to a linked library: half-precision conversions, which
objects define weakly themselves."""


def check_objects(members: Iterable[Member], platform: ApplePlatform) -> None:
    """Platform, minimum version and undefined symbols of every object, and that no two define the
    same.

    Raises:
        CheckFailedError: says which object and what.
    """
    owners: dict[str, str] = {}
    for name, data in members:
        found = macho.parse(data, name)
        if found.filetype != macho.OBJECT:
            raise CheckFailedError(f"{name} is no object file")
        _check_platform(found, name, platform)
        _check_undefined(found, name, RUNTIME_SYMBOLS | SYSTEM_SYMBOLS)
        for symbol in found.defined.values():
            if not symbol.weak and owners.setdefault(symbol.name, name) != name:
                raise CheckFailedError(
                    f"{name} and {owners[symbol.name]} both define {symbol.name}: no app could "
                    "link them"
                )


def check_system_library(members: Sequence[Member], prefix: str) -> None:
    """What a runtime looks up when it is asked for this prefix, and the registration that makes it
    found.

    Raises:
        CheckFailedError: says what is missing.
    """
    files = [macho.parse(data, name) for name, data in members]
    defined = {symbol for file in files for symbol in file.defined}
    for wanted in (f"_{prefix}__tvm_ffi__library_bin", f"_{prefix}__tvm_ffi__library_ctx"):
        if wanted not in defined:
            raise CheckFailedError(f"the library for prefix {prefix!r} does not define {wanted}")
    if not any(name.startswith(f"___tvm_ffi_{prefix}") for name in defined):
        raise CheckFailedError(f"the library for prefix {prefix!r} defines no function")
    for (name, _), file in zip(members, files, strict=True):
        if not file.sections.get(("__DATA", "__mod_init_func")):
            raise CheckFailedError(f"{name} does not register itself when an app starts")
    foreign = [
        name
        for file in files
        for name, symbol in file.defined.items()
        if not symbol.weak and prefix not in name
    ]
    if foreign:
        raise CheckFailedError(f"{foreign[0]} does not carry the prefix {prefix!r}")


def check_archive(data: bytes, members: Sequence[Member], where: str) -> None:
    """An archive holds just these members, with distinct names, and indexes every symbol that
    they define.

    Raises:
        CheckFailedError: says what is missing.
    """
    archive = macho.parse_archive(data, where)
    if archive.index is None:
        raise CheckFailedError(f"{where} has no index: Apple's linker refuses it")
    # Darwin's format pads a member with newlines to a multiple of eight bytes.
    found = {name: content for _, name, content in archive.members}
    if len(found) != len(archive.members) or found.keys() != {name for name, _ in members}:
        raise CheckFailedError(f"{where} does not hold its members once each")
    offsets = {offset for offset, _, _ in archive.members}
    for name, content in members:
        if not found[name].startswith(content):
            raise CheckFailedError(f"{where}: the member {name} is not the object it was made of")
        for symbol in macho.parse(content, name).defined:
            if archive.index.get(symbol) not in offsets:
                raise CheckFailedError(f"{where}: its index lacks {symbol}")


def check_dylib(data: bytes, platform: ApplePlatform, where: str) -> None:
    """A dynamic library that `tvm.runtime.load_module` can load there.

    Raises:
        CheckFailedError: says what is wrong.
    """
    found = macho.parse(data, where)
    if found.filetype != macho.DYLIB or not found.install_name:
        raise CheckFailedError(f"{where} is no dynamic library")
    _check_platform(found, where, platform)
    _check_undefined(found, where, RUNTIME_SYMBOLS | SYSTEM_SYMBOLS | _LINKED_SYMBOLS)
    for wanted in ("___tvm_ffi__library_bin", "___tvm_ffi__library_ctx"):
        if wanted not in found.defined:
            raise CheckFailedError(f"{where} does not define {wanted}")
    strange = [name for name in found.libraries if not name.startswith("/usr/lib/libSystem")]
    if strange:
        raise CheckFailedError(f"{where} needs {strange[0]}, which a user may not have")


def check_contents(
    data: bytes, where: str, metadata: Mapping[str, Any], functions: Collection[str]
) -> None:
    """The bytes hold this metadata and the names of these functions.

    Raises:
        CheckFailedError: says what is missing.
    """
    # Through JSON: tuples become lists
    if find_metadata(data) != json.loads(json.dumps(metadata)):
        raise CheckFailedError(f"{where} does not hold the metadata that was compiled in")
    missing = sorted(name for name in functions if name.encode() not in data)
    if missing:
        raise CheckFailedError(f"{where} lacks the function {missing[0]}")


def _check_platform(found: macho.MachO, name: str, platform: ApplePlatform) -> None:
    if found.cpu != macho.ARM64:
        raise CheckFailedError(f"{name} is not for arm64")
    if (found.platform, found.minimum) != (platform.number, platform.minimum):
        raise CheckFailedError(
            f"{name} says platform {found.platform}, version {found.minimum}, not "
            f"{platform.title} ({platform.number}), {platform.minimum}"
        )


def _check_undefined(found: macho.MachO, name: str, allowed: Collection[str]) -> None:
    unknown = sorted(found.undefined - set(allowed))
    if unknown:
        raise CheckFailedError(
            f"{name} needs {', '.join(unknown)}, which nothing in an app is sure to provide"
        )
