"""A plan is one value in three forms: string, YAML and Python."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimtab.errors import ConfigError, PlanError
from trimtab.kvcache.full import FullOptions
from trimtab.models.shapes import shape
from trimtab.plan import MethodChoice, Plan
from trimtab.registry import KV_CACHES, Card, Method
from trimtab.sizes import format_bytes, parse_bytes

CARD = Card(title="T", idea="i", exactness="e", cost="c", needs="n", avoid_when="a")


@dataclass(frozen=True, slots=True)
class SieveOptions:
    """One option of every type a method may have."""

    bits: Literal[2, 4] = dataclasses.field(default=2, metadata={"label": True})
    ratio: float = 0.5
    rows: int = 8
    sinks: bool = True
    limit: int | None = None
    note: str = "a"
    sizes: tuple[int, ...] = (1, 2)


class Sieve:
    stage = "store"

    @staticmethod
    def problems(options: SieveOptions, plan: Plan, config: object) -> list[str]:
        found = []
        if options.rows > 100:
            found.append(f"rows is {options.rows} but at most 100 fit")
        if plan.dtype == "float16":
            found.append("dtype float16 overflows it")
        return found


@pytest.fixture(scope="module", autouse=True)
def sieve():
    """A method of our own beside the shipped ones, so that every option type is met."""
    KV_CACHES._methods["sieve"] = Method("sieve", "cache", Sieve, SieveOptions, CARD)
    yield
    del KV_CACHES._methods["sieve"]


def test_three_forms_are_one_plan(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        "model: some/model\ncache:\n  name: sieve\n  options: {bits: 4, rows: 16}\n"
        "dtype: bfloat16\nkv_memory: 512MiB\nprefix_caching: false\n"
    )
    text = "model=some/model cache=sieve:bits=4,rows=16 dtype=bf16 kv_memory=512MiB prefix_caching=off"
    made = Plan(
        "some/model",
        cache=MethodChoice("sieve", SieveOptions(bits=4, rows=16)),
        dtype="bfloat16",
        kv_memory=512 * 1024**2,
        prefix_caching=False,
    )
    assert Plan.parse(text) == Plan.from_file(file) == made
    assert Plan.of(text) == Plan.of(file) == Plan.of(str(file)) == Plan.of(made.to_dict()) == Plan.of(made)
    assert hash(Plan.parse(text)) == hash(made)


@pytest.mark.parametrize("shorthand", ["full", "sieve:bits=4", "sieve:bits=4,ratio=0.25"])
def test_a_bare_method_means_the_cache(shorthand):
    assert Plan.parse(shorthand) == Plan(cache=shorthand) == Plan.parse(f"cache={shorthand}")


def test_shipped_policies_parse_with_their_options():
    plan = Plan.parse("kivi:bits=4,group_size=32 dtype=fp32")
    assert (plan.cache.name, plan.cache.options.bits, plan.cache.options.group_size) == ("kivi", 4, 32)
    assert plan.dtype == "float32"


PLANS = st.builds(
    Plan,
    model=st.none() | st.text(min_size=1).filter(lambda text: text != "none"),
    adapter=st.none() | st.text(min_size=1).filter(lambda text: text != "none"),
    dtype=st.sampled_from(["auto", "fp32", "bfloat16", "fp16"]),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    cache=st.just("full")
    | st.builds(
        lambda **options: MethodChoice("sieve", SieveOptions(**options)),
        bits=st.sampled_from([2, 4]),
        ratio=st.floats(allow_nan=False),
        rows=st.integers(),
        sinks=st.booleans(),
        limit=st.none() | st.integers(),
        note=st.text(),
        sizes=st.lists(st.integers(), min_size=1).map(tuple),
    ),
    kv_memory=st.none() | st.integers(min_value=1, max_value=2**50),
    max_batch=st.integers(min_value=1, max_value=10**6),
    max_step_tokens=st.integers(min_value=1, max_value=10**6),
    prefix_caching=st.booleans(),
    backend=st.sampled_from(["auto", "native", "torch"]),
    threads=st.none() | st.integers(min_value=1, max_value=999),
)


@example(Plan(model="a b'c", cache=MethodChoice("full", FullOptions())))
@example(Plan(cache=MethodChoice("full", FullOptions()), model="line\x85line"))
@settings(deadline=None)  # times on a shared machine say nothing
@given(PLANS)
def test_every_plan_survives_every_form(plan):
    assert Plan.parse(str(plan)) == plan
    assert Plan.parse(plan.label) == plan.with_(model=None)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(yaml.safe_load(plan.to_yaml())) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("full", "full"),
        ("sieve", "sieve:bits=2"),
        ("sieve:rows=16,bits=2", "sieve:bits=2,rows=16"),
        ("sieve:rows=8", "sieve:bits=2"),
        ("model=m full max_batch=4 dtype=fp32", "full dtype=float32 max_batch=4"),
        ("full kv_memory=1KiB", "full kv_memory=1024"),
    ],
)
def test_labels_are_short_and_canonical(text, label):
    assert Plan.parse(text).label == label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a plan is empty"),
        ("cash=full", r"unknown setting 'cash' in a plan\. Did you mean 'cache'"),
        ("cache=full cache=full", r"gives 'cache' twice"),
        ("full sieve", r"gives 'cache' twice"),
        ("sieve:", r"write METHOD or METHOD:option=value"),
        ("sieve:bits", r"'bits' is not of the form option=value"),
        ("sieve:bits=2,bits=4", r"the option 'bits' is given twice"),
        ("sieve:bits=3", r"option 'bits' of cache method 'sieve' is '3'; allowed: 2, 4"),
        ("sieve:bit=2", r"unknown option 'bit' of cache method 'sieve'\. Did you mean 'bits'"),
        ("kivy", r"unknown cache method 'kivy'\. Did you mean 'kivi'"),
        ("sieve:note='a", r"has a quote that is not closed"),
        ("dtype=bfloat61", r"dtype is 'bfloat61'; allowed: auto, float32, .*Did you mean 'bfloat16'"),
        ("device=gpu", r"device is 'gpu'; allowed: auto, cpu, cuda or cuda:N"),
        ("kv_memory=lots", r"kv_memory is 'lots'; write bytes, or for example '512MiB' or '2GB'"),
        ("kv_memory=0", r"kv_memory is '0'; it must be more than zero"),
        ("max_batch=0", r"max_batch is '0'; it must be a whole number of at least 1"),
        ("max_step_tokens=x", r"max_step_tokens is 'x'; it must be a whole number of at least 1"),
        ("threads=-1", r"threads is '-1'; it must be a whole number of at least 1"),
        ("prefix_caching=maybe", r"prefix_caching is 'maybe'; it must be true or false"),
        ("backend=natif", r"backend is 'natif'; allowed: auto, native, torch\. Did you mean 'native'"),
    ],
)
def test_a_mistake_in_a_string_is_one_clear_sentence(text, message):
    with pytest.raises(ConfigError, match=message):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("cash: full\n", r"in the plan '.*plan\.yaml': unknown setting 'cash'"),
        ("- full\n", r"must be a YAML mapping"),
        ("cache: [full\n", r"is not valid YAML"),
        ("cache: 3\n", r"cache is 3; write a string such as 'full', or a mapping"),
        ("cache: {nom: full}\n", r"a mapping with 'name' and 'options'"),
        ("cache: {name: sieve, options: [1]}\n", r"the options of cache 'sieve' are \[1\]; write a mapping"),
        ("max_batch: 2.5\n", r"max_batch is 2\.5; it must be a whole number"),
        ("max_batch: true\n", r"max_batch is True; it must be a whole number"),
        ("7: x\n", r"unknown setting 7"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, yaml_text, message):
    file = tmp_path / "plan.yaml"
    file.write_text(yaml_text)
    with pytest.raises(ConfigError, match=message):
        Plan.from_file(file)


def test_a_missing_file_is_one_clear_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the plan '.*none\.yaml': No such file"):
        Plan.from_file(tmp_path / "none.yaml")


def test_a_model_folder_beside_the_file_is_found(tmp_path):
    (tmp_path / "mine").mkdir()
    file = tmp_path / "plan.yaml"
    file.write_text("model: mine\n")
    assert Plan.from_file(file).model == str(tmp_path / "mine")


def test_with_changes_are_checked():
    plan = Plan(cache="sieve").with_(threads=1, cache="full")
    assert (plan.threads, plan.cache.name) == (1, "full")
    with pytest.raises(ConfigError, match="unknown setting 'thread'"):
        plan.with_(thread=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.threads = 2  # type: ignore[misc]


def test_all_reasons_come_at_once():
    plan = Plan(cache="sieve:rows=200", dtype="float16", device="cuda", backend="native")
    reasons = plan.problems(None)  # type: ignore[arg-type]
    assert len(reasons) == 3
    assert "backend=native is for CPUs, but device=cuda" in reasons[0]
    assert reasons[1] == "cache sieve:bits=2,rows=200: rows is 200 but at most 100 fit"
    with pytest.raises(PlanError, match="for 3 reasons") as caught:
        plan.check(None)  # type: ignore[arg-type]
    assert caught.value.reasons == reasons
    Plan(cache="sieve").check(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [(1, 1), ("1024", 1024), ("512MiB", 512 * 1024**2), ("2GB", 2 * 10**9), ("1.5 kib", 1536), ("3b", 3)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 MiBs", "1e9", True, None, "512M"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="a size is"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**3, "3.0 GiB"), (2**41, "2.0 TiB")],
)
def test_sizes_for_people(size, text):
    assert format_bytes(size) == text


def test_methods_combine_in_the_order_in_which_they_work():
    written = Plan(cache="snapkv:budget=64+sieve:bits=4,sizes=3+4")
    assert [c.name for c in written.cache.all] == ["snapkv", "sieve"]
    assert written.cache.then[0].options.sizes == (3, 4)
    assert str(written.cache) == "snapkv:budget=64+sieve:bits=4,sizes=3+4"
    assert Plan(cache="sieve:bits=4,sizes=3+4+snapkv:budget=64") == written
    assert (
        Plan(cache=["snapkv:budget=64", {"name": "sieve", "options": {"bits": 4, "sizes": [3, 4]}}])
        == written
    )
    assert Plan.from_dict(yaml.safe_load(written.to_yaml())) == written


def test_a_plus_inside_quotes_is_text():
    plan = Plan(cache=MethodChoice("sieve", SieveOptions(note="a+snapkv")))
    assert Plan.parse(str(plan)) == plan and not plan.cache.then


def test_methods_that_exclude_each_other_are_refused_with_the_reason():
    for cache, reason in {
        "full+snapkv": "full cannot be combined with snapkv",
        "snapkv+h2o": "both decide which rows stay",
    }.items():
        assert any(reason in p for p in Plan(cache=cache).problems(shape("125m"))), cache
