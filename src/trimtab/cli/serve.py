"""`trimtab serve`: plans of a model behind the HTTP API that clients of OpenAI speak."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import common

if TYPE_CHECKING:
    from trimtab.serving.settings import ServerSettings


def _option(help: str, metavar: str, *names: str) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


def _switch(help: str, name: str) -> Any:
    return typer.Option(f"--{name}/--no-{name}", help=help, show_default=False)


def run(
    model: common.ModelArgument = None,
    plans: Annotated[
        list[str] | None,
        _option("A plan string or YAML file; repeat to serve several side by side.", "PLAN", "--plan"),
    ] = None,
    adapter: common.AdapterOption = None,
    weights: common.WeightsOption = None,
    cache: common.CacheOption = None,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    threads: common.ThreadsOption = None,
    kv_memory: common.KvMemoryOption = None,
    backend: common.BackendOption = None,
    served_model_name: Annotated[
        str | None, _option("The name clients ask for. Default: the folder's.", "NAME")
    ] = None,
    tool_format: Annotated[
        str | None, _option("How the model writes tool calls. Default: auto, from its template.", "NAME")
    ] = None,
    host: Annotated[
        str | None, _option("Address to listen on. Default: 127.0.0.1, this machine only.", "HOST")
    ] = None,
    port: Annotated[int | None, _option("Port; 0 takes a free one. Default: 8000.", "N")] = None,
    root_path: Annotated[
        str | None, _option("Path under which a proxy publishes the server, e.g. /llm.", "PATH")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        _option("Key that /v1 asks for; may be repeated. Better: the variable TRIMTAB_API_KEY.", "KEY"),
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        _option("Web origin that may call from a browser, or '*'; may be repeated.", "URL", "--cors-origin"),
    ] = None,
    playground: Annotated[bool | None, _switch("The page at /. Default: on.", "playground")] = None,
    max_queue: Annotated[
        int | None, _option("Most completions waiting; more are answered 429. Default: 256.", "N")
    ] = None,
    max_n: Annotated[
        int | None, _option("Most completions of one request, all prompts together. Default: 128.", "N")
    ] = None,
    max_body: Annotated[
        str | None, _option("Largest request body; larger: 413. Default: 8MiB.", "SIZE")
    ] = None,
    request_timeout: Annotated[
        str | None, _option("Longest time for one request, e.g. 2min. Default: none.", "TIME")
    ] = None,
    drain_timeout: Annotated[
        str | None, _option("On SIGTERM, time for running requests to end. Default: 30s.", "TIME")
    ] = None,
    stream_interval: Annotated[
        str | None,
        _option(
            "Least time between two chunks of a stream; 0: every token. Default: auto (20ms, more for many "
            "streams).",
            "TIME",
        ),
    ] = None,
    log_requests: Annotated[
        bool | None, _switch("One JSON line for each request. Default: on.", "log-requests")
    ] = None,
    log_prompts: Annotated[
        bool | None, _switch("Prompts in these lines. Default: off.", "log-prompts")
    ] = None,
    log_file: Annotated[str | None, _option("Where these lines go. Default: stderr.", "FILE")] = None,
    access_log: Annotated[
        bool | None, _switch("A line for every HTTP request on stderr. Default: off.", "access-log")
    ] = None,
    config: Annotated[
        str | None, _option("YAML file with these settings; flags and the environment win.", "FILE")
    ] = None,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print the settings in force and exit.")
    ] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients speak it, with a page to try it in.

    Each setting can also stand in the environment as TRIMTAB_SERVE_<NAME>, or in the YAML file of --config.

    \b
    Examples:
      trimtab serve
      trimtab serve ./my-model --plan full --plan cache=kivi:bits=2 --port 8080
      TRIMTAB_API_KEY=secret trimtab serve ./my-model --host 0.0.0.0
    """
    flags = {name: value for name, value in locals().items() if name not in ("config", "show_settings")}
    from trimtab.serving.settings import gather

    settings, places = gather(flags, config=config)
    if show_settings:
        _show(settings, places)
        return
    from trimtab.serving.run import serve

    raise typer.Exit(serve(settings))


def _show(settings: ServerSettings, places: dict[str, str]) -> None:
    """The settings as YAML that `--config` reads, each with the place it comes from; keys stay hidden."""
    for name, value in settings.to_dict().items():
        print(f"{name}: {json.dumps(value)}  # {places.get(name, 'by default')}")
    count = len(settings.api_key)
    keys = "no keys" if not count else "1 key, hidden" if count == 1 else f"{count} keys, hidden"
    print(f"# api_key: {keys} ({places.get('api_key', 'by default')})")
