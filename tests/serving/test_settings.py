"""Settings: four sources in their order, one clear sentence for a mistake, with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.cli import serve as command
from trimtab.errors import ConfigError
from trimtab.plan import Plan
from trimtab.serving.settings import NAMES, PARSERS, ServerSettings, gather
from trimtab.serving.values import TOOL_FORMATS

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        file = tmp_path / "serve.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


def test_defaults_are_safe():
    settings, places = gather({}, {})
    assert places == {}
    assert settings.host == "127.0.0.1"
    assert (settings.api_key, settings.cors_origins, settings.log_prompts) == ((), (), False)


def test_flags_win_over_the_environment_which_wins_over_the_file(yaml_file):
    config = yaml_file("port: 1\nmax_queue: 1\nmax_n: 1\n")
    environ = {"TRIMTAB_SERVE_PORT": "2", "TRIMTAB_SERVE_MAX_QUEUE": "2"}
    settings, places = gather({"port": 3, "host": None, "api_key": []}, environ, config)
    assert (settings.port, settings.max_queue, settings.max_n, settings.max_body) == (3, 2, 1, 8 << 20)
    assert places["port"] == "on the command line"
    assert places["max_queue"] == "in the environment variable TRIMTAB_SERVE_MAX_QUEUE"
    assert places["max_n"] == f"{config}, line 3"
    assert "host" not in places and "api_key" not in places


def test_the_file_can_be_named_in_the_environment(yaml_file):
    settings, _ = gather({}, {"TRIMTAB_SERVE_CONFIG": yaml_file("port: 77")})
    assert settings.port == 77


def test_lists_stand_between_semicolons_in_the_environment():
    settings, _ = gather(
        {},
        {
            "TRIMTAB_API_KEY": "one;two",
            "TRIMTAB_SERVE_PLANS": "full; cache=kivi:bits=2,group_size=32",
            "TRIMTAB_SERVE_CORS_ORIGINS": "https://a.example",
        },
    )
    assert settings.api_key == ("one", "two")
    assert [str(plan) for plan in settings.plans] == ["full", str(Plan.parse("kivi:bits=2,group_size=32"))]
    assert settings.cors_origins == ("https://a.example",)


def test_durations_and_sizes_are_written_as_people_write_them():
    settings = ServerSettings(
        stream_interval="50ms", request_timeout="2min", drain_timeout="1.5s", max_body="2MB"
    )
    assert settings.stream_interval == pytest.approx(0.05)
    assert (settings.request_timeout, settings.drain_timeout, settings.max_body) == (120, 1.5, 2_000_000)
    assert ServerSettings(request_timeout="none").request_timeout is None
    assert ServerSettings(stream_interval=0).stream_interval == 0
    assert ServerSettings(stream_interval="auto") == ServerSettings()


def test_options_go_over_the_plans_beside_them():
    settings, _ = gather({"plans": ["full", "kivi:bits=2 threads=1"], "threads": 2, "model": "m"}, {})
    assert [(p.threads, p.model, p.cache.name) for p in settings.plans] == [
        (2, "m", "full"),
        (2, "m", "kivi"),
    ]
    alone, _ = gather({"cache": "kivi:bits=2"}, {})
    assert [p.cache.name for p in alone.plans] == ["kivi"]


def test_a_plan_wins_over_options_of_a_lower_source(yaml_file):
    config = yaml_file("cache: kivi:bits=2\nkv_memory: 64MiB\nthreads: 2\n")
    settings, _ = gather({"plans": ["full threads=1"]}, {}, config)
    (plan,) = settings.plans
    assert (plan.cache.name, plan.threads, plan.kv_memory) == ("full", 1, 64 << 20)


def test_a_model_and_plans_beside_the_file_are_found(tmp_path, yaml_file):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "small.yaml").write_text("cache: kivi:bits=2")
    settings, _ = gather({}, {}, yaml_file("model: my-model\nplans: [full, small.yaml]\n"))
    assert [plan.cache.name for plan in settings.plans] == ["full", "kivi"]
    assert settings.names == ("my-model", "my-model:kivi:bits=2")


def test_names_tell_the_plans_apart_and_leave_out_what_they_share():
    settings = ServerSettings(plans=("full threads=1", "kivi:bits=2 threads=1", "full threads=1 max_batch=4"))
    assert settings.names == ("tiny", "tiny:kivi:bits=2", "tiny:full max_batch=4")
    assert ServerSettings(plans=(Plan("owner/name"),)).names == ("owner/name",)
    assert ServerSettings(served_model_name="gpt").names == ("gpt",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70000}, "port is 70000; it must be a whole number from 0 to 65535"),
        ({"port": True}, "port is True"),
        ({"max_queue": "many"}, "max_queue is 'many'; it must be a whole number of at least 1"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"max_body": "big"}, "max_body is 'big'; write bytes"),
        ({"drain_timeout": "-1"}, "drain_timeout is '-1'; write seconds, or for example '20ms'"),
        ({"drain_timeout": "nan"}, "drain_timeout is 'nan'"),
        ({"stream_interval": "5 weeks"}, "stream_interval is '5 weeks'"),
        ({"request_timeout": 0}, "request_timeout is 0; give more than zero seconds, or 'none'"),
        ({"playground": "maybe"}, "playground is 'maybe'; it must be true or false"),
        ({"host": ""}, "host is ''"),
        ({"served_model_name": "a\nb"}, "served_model_name is 'a\\nb'"),
        ({"tool_format": "herms"}, "tool_format is 'herms', which is no tool format. Did you mean 'hermes'"),
        ({"root_path": "llm/"}, "root_path is 'llm/'; write a path such as '/llm'"),
        ({"cors_origins": "https://a,https://b"}, "cors_origins is 'https://a,https://b'; write an origin"),
        ({"api_key": "two words"}, "api_key has a key that is empty or has blanks"),
        ({"plans": ()}, "plans is empty"),
        ({"plans": ("full", "full")}, "the plan 'full' is given twice"),
        ({"plans": ("full", "full dtype=float16")}, "the plans differ in dtype (auto, float16)"),
        ({"plans": (3,)}, "plans has 3; write a plan"),
        ({"plans": ("kivy",)}, "Did you mean 'kivi'"),
        ({"log_file": "x", "log_requests": False}, "log_file has no effect while log_requests is off"),
        ({"log_prompts": True, "log_requests": False}, "log_prompts has no effect while log_requests is off"),
    ],
)
def test_mistakes_name_setting_value_and_fix(values, message):
    with pytest.raises(ConfigError) as caught:
        ServerSettings(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host: h\nprot: 1\n", "serve.yaml, line 2: unknown setting 'prot'. Did you mean 'port'"),
        ("host: h\nport: [1\n", "serve.yaml, line 3: not valid YAML"),
        ("\nport: x\n", "serve.yaml, line 2: port is 'x'; it must be a whole number"),
        ("port: 1\nport: 2\n", "serve.yaml, line 2: the setting 'port' is given twice"),
        ("- port\n", "serve.yaml, line 1: expected settings such as 'port: 8000'"),
        ("port: !!int x\n", "serve.yaml, line 1: "),
        ("cache: ful\n", "serve.yaml, line 1: unknown cache method 'ful'"),
    ],
)
def test_mistakes_in_a_file_name_file_and_line(yaml_file, text, message):
    with pytest.raises(ConfigError) as caught:
        gather({}, {}, yaml_file(text))
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the settings .*nothing\.yaml"):
        gather({}, {}, str(tmp_path / "nothing.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text in UTF-8"):
        gather({}, {}, str(tmp_path / "bytes.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert gather({}, {}, str(tmp_path / "empty.yaml"))[0] == ServerSettings()


def test_unknown_variables_of_ours_are_refused_and_others_are_not_ours():
    with pytest.raises(ConfigError, match="TRIMTAB_SERVE_PROT: unknown setting 'prot'"):
        gather({}, {"TRIMTAB_SERVE_PROT": "1"})
    assert gather({}, {"TRIMTAB_HOME": "/x", "PORT": "1"})[0] == ServerSettings()


def test_the_command_has_a_flag_for_every_setting_and_no_other():
    import inspect

    flags = set(inspect.signature(command.run).parameters)
    assert flags - {"config", "show_settings"} == set(NAMES)


def test_what_is_shown_can_be_read_back_and_hides_the_keys(trimtab_show, yaml_file):
    shown = trimtab_show("--port", "90", "--plan", "full", "--plan", "kivi:bits=2", "--api-key", "s3cret")
    assert "s3cret" not in shown and "# api_key: 1 key, hidden (on the command line)" in shown
    assert "port: 90  # on the command line" in shown
    settings, places = gather({}, {}, yaml_file(shown))
    assert settings == ServerSettings(port=90, plans=("full", "kivi:bits=2"))
    assert set(places) == set(PARSERS) - {"api_key"}


@pytest.fixture
def trimtab_show(monkeypatch):
    from typer.testing import CliRunner

    from trimtab.cli.main import app

    def show(*words: str) -> str:
        return CliRunner().invoke(app, ["serve", "--show-settings", *words], catch_exceptions=False).stdout

    return show


def test_the_tool_formats_are_those_there_are():
    from trimtab.serving.tools.formats import NAMES as there

    assert sorted(TOOL_FORMATS) == sorted(there)


def test_keys_stay_out_of_the_representation():
    assert "s3cret" not in repr(ServerSettings(api_key="s3cret"))
    assert "s3cret" not in json.dumps(ServerSettings(api_key="s3cret").to_dict())


def test_the_page_has_every_setting():
    text = DOCS.read_text(encoding="utf-8")
    missing = [name for name in PARSERS if f"`{name}`" not in text]
    assert not missing
