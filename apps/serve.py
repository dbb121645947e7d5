"""``mm1 serve``: an OpenAI-compatible server and a web page around a model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm1_mlx.answer import MAX_TOKENS

from .common import (
    AdapterNames,
    Model,
    Resolution,
    VisionBackend,
    Yes,
    named_adapters,
    note,
    print_json,
)
from .server.policy import MAX_PARALLEL, Policy, is_address, is_loopback

if TYPE_CHECKING:
    from .server.keeper import Loaded

KEY_VARIABLE = "MM1_API_KEY"
# Of a key, in characters: what is shorter could be guessed.
MIN_KEY = 8


def serve(
    model: Model = None,
    adapter: AdapterNames = None,
    vision_backend: VisionBackend = "mlx",
    resolution: Resolution = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="the model's id in the API (default: the end of its name)",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="address to listen at; others than this machine's need a key")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="0 takes one that is free", min=0, max=65535)
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"what callers must send as a Bearer token (default: ${KEY_VARIABLE}; "
            "other users of this machine can read it here, not in a file)",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="a file that holds the key alone", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="a name of this server's that callers may use, several times",
            show_default=False,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="a site whose pages may call it, https://example.org, several times",
            show_default=False,
        ),
    ] = None,
    allow_remote_images: Annotated[
        list[str] | None,
        typer.Option(
            help="a host that pictures may be fetched from, by https, several times",
            show_default=False,
        ),
    ] = None,
    media_root: Annotated[
        Path | None,
        typer.Option(
            help="a folder that file:// pictures may lie in", show_default=False
        ),
    ] = None,
    parallel: Annotated[
        int, typer.Option(help="answers under way at once", min=1, max=MAX_PARALLEL)
    ] = Policy.parallel,
    max_waiting: Annotated[
        int, typer.Option(help="questions that may wait; more are refused", min=1)
    ] = Policy.max_waiting,
    max_tokens: Annotated[
        int,
        typer.Option(
            help="longest answer where a caller names none, in tokens",
            min=1, max=MAX_TOKENS,
        ),
    ] = Policy.max_tokens,
    idle_unload: Annotated[
        float | None,
        typer.Option(
            help="let the model go after so many seconds without a question, and load "
            "it again for the next",
            min=1, show_default=False,
        ),
    ] = None,
    log: Annotated[
        bool, typer.Option("--log/--no-log", help="print a line for every request")
    ] = True,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="once it serves, print its address, model and version as one line of "
            "JSON",
        ),
    ] = False,
    exit_with_stdin: Annotated[
        bool,
        typer.Option(
            "--exit-with-stdin",
            help="end when stdin closes, as it does when the program that started the "
            "server ends",
        ),
    ] = False,
    yes: Yes = False,
) -> None:  # fmt: skip
    """Serve a model to OpenAI's clients, and a web page to talk with it."""
    _check_installed()
    if exit_with_stdin:
        from .server.parent import end_with

        # Before the model is read, which takes long.
        end_with(0)
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx import __version__

    from .cached import resolve
    from .server.app import make_app
    from .server.keeper import Keeper, open_model
    from .server.run import listen, make_server
    from .server.service import Service

    key = _read_key(api_key, api_key_file)
    if key is None and not is_loopback(host):
        raise typer.BadParameter(
            f"--host {host} lets others in: give a key by --api-key-file or ${KEY_VARIABLE}"
        )
    policy = replace(
        _policy(host, allow_host, allow_origin, allow_remote_images, media_root),
        key=key,
        parallel=parallel,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
    )
    # Before gigabytes are read.
    held = listen(host, port)

    def load() -> Loaded:
        return open_model(
            policy,
            source=resolve(model, yes),
            resolution=resolution,
            adapters=named_adapters(adapter),
            vision_backend=vision_backend,
        )

    loaded = load()
    folder = loaded.path
    service = Service(
        name=name or _name(model, folder),
        created=int((folder / "config.json").stat().st_mtime),
        keeper=Keeper(load, loaded, idle_unload, policy.load_seconds),
        policy=policy,
    )
    address, bound = held.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address

    url = f"http://{shown}:{bound}"

    def ready() -> None:
        note(f"serving {service.name} at {url} (Ctrl-C ends it)")
        if as_json:
            served = {"url": url, "model": service.name, "version": __version__}
            print_json(served, indent=None)

    app = make_app(service, note if log else None)
    make_server(app, policy, ready).run(sockets=[held])


def _check_installed() -> None:
    from importlib.util import find_spec

    from mm1_mlx.errors import ConfigError

    needed = ("starlette", "uvicorn", "h11", "pydantic", "prometheus_client")
    if missing := [part for part in needed if find_spec(part) is None]:
        raise ConfigError(
            f'the server needs {", ".join(missing)}; pip install "mm1-mlx[server]"'
        )


def _read_key(given: str | None, file: Path | None) -> str | None:
    """The key, None where there is none."""
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.folders import user_path

    if given is not None and file is not None:
        raise typer.BadParameter("give --api-key or --api-key-file, not both")
    source, key = "--api-key", given
    if file is not None:
        source = str(file)
        # Every byte is a character, also of a file that is no text.
        key = user_path(source).read_text("latin-1").strip()
    elif given is None:
        source, key = f"${KEY_VARIABLE}", os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    printable = key.isascii() and key.isprintable() and " " not in key
    if len(key) < MIN_KEY or not printable:
        raise ConfigError(
            f"{source} holds no key: expected at least {MIN_KEY} printable ASCII "
            "characters without a space"
        )
    return key


def _policy(
    host: str,
    hosts: list[str] | None,
    origins: list[str] | None,
    remote_hosts: list[str] | None,
    media_root: Path | None,
) -> Policy:
    """Whom a server at this host lets in, and what it reads for them."""
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.folders import user_path

    for origin in origins or []:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise typer.BadParameter(
                f"--allow-origin {origin!r} is none, expected such as https://example.org"
            )
    for remote in remote_hosts or []:
        if not remote or any(c in remote for c in "/:@*"):
            raise typer.BadParameter(
                f"--allow-remote-images {remote!r} is no host's name, expected such as "
                "images.example.org"
            )
    # An address is known by the connection; of a wildcard nobody makes a name.
    named = [] if is_address(host) or host == "localhost" else [host]
    root = None
    if media_root is not None:
        root = user_path(str(media_root)).resolve()
        if not root.is_dir():
            raise ConfigError(f"--media-root {str(root)!r} is no folder")
    return Policy(
        hosts=frozenset(x.lower() for x in [*(hosts or []), *named]),
        origins=frozenset(origins or []),
        remote_hosts=frozenset(x.lower() for x in remote_hosts or []),
        media_root=root,
    )


def _name(model: str | None, folder: Path) -> str:
    """What a model is called that nobody named."""
    from mm1_mlx.runtime import TINY

    if folder == TINY:
        return "mm1-tiny"
    return model if model and model.count("/") == 1 else folder.resolve().name
