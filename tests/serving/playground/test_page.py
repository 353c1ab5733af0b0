import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from trimtab.serving.playground.page import PAGE, TYPES, assets, router


@pytest.fixture
def client():
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


def test_the_page_and_each_of_its_files_come_with_their_media_type(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"#]+)"', answer.text)
    assert {"playground/app.js", "playground/app.css", "playground/icon.svg"} == set(named)
    for name, found in assets().items():
        if name != PAGE:
            answer = client.get(f"/playground/{name}")
            assert (answer.status_code, answer.content) == (200, found.body)
            assert answer.headers["content-type"] == TYPES[name[name.rindex(".") :]]


def test_every_module_that_is_imported_is_there():
    names = assets()
    imported = {
        name
        for file, found in names.items()
        if file.endswith(".js")
        for name in re.findall(r'from "\./([^"]+)"', found.body.decode())
    }
    assert len(imported) >= 5
    assert imported <= names.keys()


def test_nothing_comes_from_outside_and_no_text_becomes_markup():
    for name, found in assets().items():
        text = found.body.decode()
        assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
        assert " style=" not in text and " onclick=" not in text, name


@pytest.mark.parametrize("path", ["/", "/playground/app.js"])
def test_a_browser_may_run_and_reach_this_server_only(client, path):
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "script-src" not in policy
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/playground/app.css"])
def test_what_has_not_changed_is_not_sent_again(client, path):
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_has_the_headers_and_no_body(client):
    answer = client.head("/")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) == len(assets()[PAGE].body)


@pytest.mark.parametrize(
    "name", ["page.py", "__init__.py", "index.html", "..%2Fpage.py", "nothing.js", ".js"]
)
def test_other_files_are_not_served(client, name):
    assert client.get(f"/playground/{name}").status_code == 404


@pytest.mark.parametrize("path", ["/playground", "/playground/"])
def test_the_folder_leads_to_the_page(client, path):
    assert client.get(path).url.path == "/"


def test_the_api_schema_does_not_tell_of_the_page(client):
    assert client.get("/openapi.json").json()["paths"] == {}
