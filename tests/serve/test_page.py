"""The page: it is whole, asks no other host, and texts in it stay texts; and what it compares σ with."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import dataclasses
import hashlib
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest

from jaxsp import distributions
from jaxsp.artifact import SoftPrompt
from jaxsp.evaluation import page as pages
from jaxsp.serve import brackets as module, page, replies, server
from jaxsp.serve.app import make_app
from jaxsp.serve.brackets import DOCUMENT, Bracket, Brackets
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.served import Served
from jaxsp.terminal import visible
from tests.browser import CHROMIUM, browsing
from tests.conftest import slow_beside
from tests.evaluation.test_page import EVIL, Reader
from tests.evaluation.test_report import example
from tests.exports import consumer
from tests.serve.running import LIMITS, Running, asked, running, shelf

QUESTION = "What is fact 7?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
NAME = "<img src=x onerror=alert(3)>&amp;"
DOCUMENTS = f"<h1>{EVIL}</h1> The tank holds 1.2 litres. The cable is 90 cm long."


def source(name: str, package: str = "jaxsp.serve") -> str:
    return importlib.resources.files(package).joinpath("html", name).read_text("utf-8")


def after(served: Served, ids: list[int], max_tokens: int = 16) -> str:
    """The model's own answer after these tokens, without a server."""
    model = served.model
    prefix = distributions.context_prefix(model.params, model.config, np.array([ids], np.int32))
    return "".join(model.stream_answer(prefix, QUESTION, served.prompt.chat, max_tokens=max_tokens))


def whole(served: Served) -> list[int]:
    """Token ids of the text before the document, and of the document."""
    prompt = served.prompt
    context = prompt.chat.context_ids(served.model.tokenizer, prompt.context or "")
    return [*prompt.manifest["slots"]["before_ids"], *context]


def root(service: Running) -> str:
    return service.url.removesuffix("v1")


def test_the_page_is_whole_and_asks_no_other_host(service):
    found = httpx.get(root(service))
    assert (found.status_code, found.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["referrer-policy"] == "no-referrer"
    read = Reader(found.text)
    assert read.open == []
    assert read.scripts == [source("page.js", "jaxsp.evaluation") + source("chat.js")]
    digest = base64.b64encode(hashlib.sha256(read.scripts[0].encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in found.headers["content-security-policy"].split("; "))
    assert rules == {
        "default-src": "'none'", "script-src": f"'sha256-{digest}'", "style-src": "'unsafe-inline'",
        "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'",
    }  # fmt: skip
    assert not read.handlers
    assert all(re.fullmatch(r"data:,|#[\w-]+", address) for address in read.addresses)
    assert len(read.ids) == len(set(read.ids))
    assert not re.search(r"https?:|url\(|@import|//\w", re.sub(r"^ *//.*$", "", found.text, flags=re.M))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", found.text)
    used = set(re.findall(r'byId\("([\w-]+)"\)', found.text))
    assert used <= set(read.ids)
    for name in [*shelf(), shelf()["pump"].prompt.context]:
        assert not name or f">{name}" not in found.text


def test_a_report_may_ask_nobody():
    assert "connect-src 'none'" in pages.policy("report.html.jinja")


def test_the_page_needs_no_key_but_shows_nothing_without_it():
    with running(api_key="secret") as service:
        assert httpx.get(root(service)).status_code == 200
        for path in ("page/prompts", "page/prompts/pump"):
            assert httpx.get(root(service) + path).status_code == 401
            found = httpx.get(root(service) + path, headers={"authorization": "Bearer secret"})
            assert found.status_code == 200
            assert found.headers["cache-control"] == "no-store"
        other = httpx.get(root(service), headers={"host": "my.example"})
        assert other.status_code == 200


def test_another_name_of_the_server_gets_no_document(service):
    found = httpx.get(f"{root(service)}page/prompts/pump", headers={"host": "evil.example"})
    assert found.status_code == 403


@pytest.mark.parametrize("name", slow_beside(["pump", "bike"], "bike"))
def test_the_brackets_answer_as_the_model_does(service, name):
    served = shelf()[name]
    before, create = served.prompt.manifest["slots"]["before_ids"], service.client.chat.completions.create
    for kind, ids in (("document", whole(served)), ("nothing", before)):
        found = create(model=f"{name}:{kind}", messages=MESSAGES, max_tokens=16)
        assert found.choices[0].message.content == after(served, ids)
        assert found.model == f"{name}:{kind}"
        read = len(served.prompt.chat.query_ids(served.model.tokenizer, QUESTION))
        assert found.usage.prompt_tokens == len(ids) + read
        held = served.prompt.manifest["context_tokens"]
        assert found.usage.prompt_tokens_details.saved_tokens == held - (len(ids) - len(before))
    assert create(model=name, messages=MESSAGES, max_tokens=16).choices[0].message.content == asked(
        name, QUESTION, 16
    )


def answered(service: Running, name: str, **options: Any) -> list[str]:
    """The tokens of an answer."""
    return [one.token for one in streamed(service, name, **options)]


def streamed(service: Running, name: str, **options: Any) -> list[Any]:
    stream = service.client.chat.completions.create(
        model=name, messages=MESSAGES, stream=True, logprobs=True, top_logprobs=5, **options
    )
    chosen: list[Any] = [chunk.choices[0] for chunk in stream]
    return [one for choice in chosen if choice.logprobs for one in choice.logprobs.content]


def test_the_three_are_streamed_at_once_with_their_likeliest_tokens(service):
    names = ["pump", "pump:document", "pump:nothing"]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda name: streamed(service, name, max_tokens=12), names))
    served = shelf()["pump"]
    expected = [asked("pump", QUESTION, 12), after(served, whole(served), 12)]
    for own, text in zip(found, expected, strict=False):
        assert bytes(i for one in own for i in one.bytes).decode("utf-8", "replace") == text
    assert all(len(one.top_logprobs) == 5 for own in found for one in own)
    assert len({tuple(one.token for one in own) for own in found}) == 3


def test_the_brackets_are_not_listed_but_known(service):
    assert not [model.id for model in service.client.models.list() if ":" in model.id]
    found = service.client.models.retrieve("oven@2:document").model_extra
    assert (found["kind"], found["prompt_length"]) == ("document", found["context_tokens"])
    assert service.client.models.retrieve("oven:nothing").model_extra["prompt_length"] == 0
    for name in ("pump:else", "pomp:document", ":nothing"):
        with pytest.raises(openai.NotFoundError, match="There is no model"):
            service.client.chat.completions.create(model=name, messages=MESSAGES)


def test_what_the_document_is_to_nothing_is_news():
    served = shelf()["pump"]
    ids = {
        kind: len(Bracket(f"pump:{kind}", kind, served).unread.request_ids(wish(served), 256))
        for kind in ("document", "nothing")
    }
    assert ids["nothing"] > ids["document"] + 20


def wish(served: Served) -> Any:
    from jaxsp.serve.schema import read_chat

    system = {"role": "system", "content": served.prompt.context}
    return read_chat({"model": "pump", "messages": [system, *MESSAGES]})


def without(served: Served, **changes: Any) -> Bracket:
    """The bracket of a soft prompt that is another one."""
    return Bracket(
        "x", DOCUMENT, dataclasses.replace(served, prompt=dataclasses.replace(served.prompt, **changes))
    )


def test_a_document_that_is_not_there_or_too_long_is_not_asked(monkeypatch):
    served, own = shelf()["pump"], Brackets(shelf(), LIMITS, slots=1, queue=1)
    gone = without(served, context=None)
    assert gone.missing == "The document is not in the soft prompt's folder (context.txt)."
    room = 512 - len(served.prompt.manifest["slots"]["before_ids"]) - 2
    manifest = served.prompt.manifest
    assert without(served, manifest={**manifest, "context_tokens": room}).missing is None
    long = without(served, manifest={**manifest, "context_tokens": room + 1})
    assert f"has {room + 1} tokens; the model's window of 512 has room for {room}." in (long.missing or "")
    with concurrent.futures.ThreadPoolExecutor(1) as encoder, pytest.raises(Refusal, match="has room for"):
        asyncio.run(own.open(long, encoder))
    assert own.in_words is not None
    assert "up to 2 whole documents: from the first question on, keys and values of 0." in own.in_words


class Idle:
    """In place of a batch's scheduler."""

    count, is_closed = 0, False

    def close(self) -> None:
        self.is_closed = True


def test_of_documents_the_one_not_asked_for_longest_makes_room(monkeypatch):
    made: list[Any] = []

    def prepared(self: Brackets, bracket: Bracket, ids: list[int]) -> Any:
        assert ids
        made.append(Idle())
        return bracket.of.prefix, made[-1]

    monkeypatch.setattr(Brackets, "_prepared", prepared)
    own = Brackets(shelf(), LIMITS, slots=1, queue=1)

    async def ask() -> None:
        async def open(name: str) -> Any:
            bracket = own.find(f"{name}:document")
            assert bracket is not None
            return (await own.open(bracket, encoder))[1]

        pump, again = await asyncio.gather(open("pump"), open("pump"))
        assert pump is again is made[0]
        oven = await open("oven@2")
        assert await open("oven") is oven  # the same document
        await open("pump")
        await open("lamp")
        assert [one.is_closed for one in made] == [False, True, False]
        pump.count = made[2].count = 1
        assert own.count == 2
        with pytest.raises(Refusal, match="2 other documents are being asked") as full:
            await open("oven")
        assert full.value.status == 429

    with concurrent.futures.ThreadPoolExecutor(1) as encoder:
        asyncio.run(ask())
    own.close()
    assert all(one.is_closed for one in made)


def test_a_document_that_can_not_be_read_is_tried_anew(monkeypatch):
    own, tries = Brackets(shelf(), LIMITS, slots=1, queue=1), []

    def failing(self: Brackets, bracket: Bracket, ids: list[int]) -> Any:
        tries.append(bracket.name)
        raise module.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Brackets, "_prepared", failing)
    bracket = own.find("pump:document")
    assert bracket is not None
    with concurrent.futures.ThreadPoolExecutor(1) as encoder:
        for _ in range(2):
            with pytest.raises(Refusal, match="no memory left to read the document") as full:
                asyncio.run(own.open(bracket, encoder))
            assert full.value.status == 503
    assert len(tries) == 2


@pytest.fixture(scope="module")
def strange(tmp_path_factory) -> Any:
    """A soft prompt whose name, document and report hold markup."""
    folder = tmp_path_factory.mktemp("served") / NAME
    consumer.prompt("llama", "key_value", context=DOCUMENTS).save(folder)
    found = example()
    for query in found["queries"]:
        query |= dict.fromkeys(("query", "answer_full_context", "answer_prompt"), EVIL)
        query["captured"] = False
    (folder / "report.json").write_text(json.dumps(found))
    return server.open_shelf(consumer.model("llama"), [(folder, SoftPrompt.load(folder))])


def test_markup_stays_text_in_what_the_page_asks_for(strange):
    scheduler: Any = Idle()
    brackets = Brackets(strange, LIMITS, slots=1, queue=1)
    app = make_app(strange, scheduler, brackets, LIMITS, api_key=None, host="127.0.0.1")

    async def get(*paths: str) -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [await client.get(path) for path in paths]

    names, document, html = asyncio.run(get("/page/prompts", f"/page/prompts/{quote(NAME, safe='')}", "/"))
    for found in (names, document):
        assert found.headers["content-type"] == "application/json"
        assert found.headers["x-content-type-options"] == "nosniff"
    assert [entry["id"] for entry in names.json()] == [NAME]
    content = document.json()
    assert "".join(piece["text"] for piece in content["passages"]) == DOCUMENTS
    assert {text for query in content["lost"] for text in query.values()} == {EVIL}
    assert EVIL not in html.text


def test_what_was_lost_is_said_as_far_as_it_is_known(tmp_path):
    served = dataclasses.replace(shelf()["pump"], folder=tmp_path)
    assert "no report beside" in page.document(served)["note"]
    report = {**example(), "error": None}  # as a run writes it
    held_out = [query for query in report["queries"] if query["split"] == "held_out"]
    missed = [query for query in held_out if not query["captured"]]
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = page.document(served)
    assert found["note"] == f"By the report, σ lost {len(missed)} of the {len(held_out)} held-out answers."
    assert [query["query"] for query in found["lost"]] == [query["query"] for query in missed]
    assert "".join(piece["text"] for piece in found["passages"]) == served.prompt.context
    cut = dataclasses.replace(served, held=2)
    assert "σ with all its 4 slots lost" in page.document(cut)["note"]
    for query in held_out:
        query["captured"] = True
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert (
        page.document(served)["note"]
        == f"By the report, σ lost none of the {len(held_out)} held-out answers."
    )
    for broken in ('{"queries": 3}', "{", "[]", '{"queries": [{}], "prompt_length": 4}'):
        (tmp_path / "report.json").write_text(broken)
        assert "damaged, or of another version" in page.document(served)["note"]
    (tmp_path / "report.json").write_text('{"error": "no"}')
    assert "training failed" in page.document(served)["note"]
    without_text = dataclasses.replace(served, prompt=dataclasses.replace(served.prompt, context=None))
    assert page.document(without_text)["passages"] == []


ENDED = "document.querySelectorAll('.side').length === {} && !document.querySelector('#stop:not([hidden])')"
TEXTS = "[...document.querySelectorAll('.side .tokens')].map((one) => one.textContent)"


def ask(view: Any, question: str = QUESTION) -> None:
    view.js(f"byId('question').value = {json.dumps(question)}")
    view.js("byId('ask').requestSubmit()")


def plain(text: str) -> str:
    """Without what stands for parts of characters."""
    return visible(text).replace("·", "").replace("\N{REPLACEMENT CHARACTER}", "")


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_three_answers_and_where_they_differ(service, tmp_path):
    served = shelf()["pump"]
    expected = [
        asked("pump", QUESTION, LIMITS.answer_tokens),
        after(served, whole(served), LIMITS.answer_tokens),
        after(served, served.prompt.manifest["slots"]["before_ids"], LIMITS.answer_tokens),
    ]
    with browsing(tmp_path) as view:
        view.open(root(service))
        view.until("!byId('chat').hidden")
        ask(view)
        view.until(ENDED.format(3))
        assert [plain(text) for text in view.js(TEXTS)] == [plain(text) for text in expected]
        framed = view.js(
            "[...document.querySelectorAll('.side .t.first')]"
            ".map((one) => [...one.parentNode.children].indexOf(one))"
        )
        tokens = [answered(service, name) for name in ("pump", "pump:document", "pump:nothing")]
        for at, own in zip(framed, tokens[::2], strict=True):
            assert own[:at] == tokens[1][:at]
            assert own[at] != tokens[1][at]
        states = view.js("[...document.querySelectorAll('.state')].map((one) => one.textContent)")
        assert f"Leaves the document's answer at token {framed[0] + 1}." in states[0]
        lists = [json.dumps([{"id": i} for i in ids]) for ids in ([1, 2, 3, 4], [1, 9, 2, 3])]
        # The first that differs is against its place, though it comes again; the others as they are the same.
        assert view.js(f"partners({', '.join(lists)})") == [0, 1, 3, -1]
        view.point(".side .t.first")
        assert (
            len(view.js("[...document.querySelectorAll('.tip .pair code')].map((one) => one.textContent)"))
            == 10
        )
        box = view.js(
            "(({x, y, right, bottom}) => [x, y, right, bottom])"
            "(document.querySelector('.tip').getBoundingClientRect())"
        )
        assert min(box) >= 0
        assert box[2] <= 1280
        assert box[3] <= 900
        ask(view, "And then?")  # a second turn, with a history of its own on each side
        view.until(ENDED.format(6))
        assert view.js("chat.sides.every((side) => side.history.length === 4)")
        assert view.js("byId('document').textContent") == served.prompt.context
        assert all(url.startswith((root(service), "data:", "about:")) for url in view.requests)
        assert view.errors == []


@pytest.mark.slow
@needs_browser
def test_in_a_browser_markup_is_text_and_nothing_of_it_runs(strange, monkeypatch, tmp_path):
    monkeypatch.setattr(replies, "token_text", lambda tokenizer, token: EVIL)
    monkeypatch.setattr(replies, "token_bytes", lambda tokenizer, token: list(EVIL.encode()))
    with running(found=strange, answer_tokens=4) as service, browsing(tmp_path) as view:
        view.open(root(service), width=390)
        view.until("!byId('chat').hidden && byId('lost').children.length > 0")
        ask(view, EVIL)
        view.until(ENDED.format(3))
        assert set(view.js(TEXTS)) <= {EVIL * n for n in range(1, 5)}
        view.point(".side .t")
        assert EVIL.replace(" ", "␣") in view.js("document.querySelector('.tip').textContent")
        assert view.js("document.querySelector('.turn h3').textContent") == EVIL
        assert view.js("byId('document').textContent").startswith("<h1>")
        assert view.js("byId('prompt').value") == NAME
        assert view.js("document.querySelectorAll('img, h1 + script, #document h1, b + b').length") == 0
        assert view.js("document.documentElement.scrollWidth") <= 390
        assert (view.dialogs, view.errors) == ([], [])


@pytest.mark.slow
@needs_browser
def test_in_a_browser_the_key_is_asked_for_and_answers_can_be_stopped(slowly, tmp_path):
    with running(api_key="secret") as service, browsing(tmp_path) as view:
        view.open(root(service))
        view.until("!byId('locked').hidden")
        for key, said in (
            ("wrong", "!byId('failure').hidden && byId('chat').hidden"),
            ("secret", "!byId('chat').hidden"),
        ):
            view.js(f"byId('key').value = {json.dumps(key)}; byId('unlock').requestSubmit()")
            view.until(said)
        assert view.js("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert view.js("byId('key').value") == ""
        ask(view)
        view.until("document.querySelector('.side .t') !== null")
        view.js("byId('stop').click()")
        view.until(ENDED.format(3))
        assert "stopped" in view.js("document.querySelector('.state').textContent")
        view.until("fetch('health').then((found) => found.json()).then((found) => found.requests === 0)")


@pytest.mark.slow
@needs_browser
def test_in_a_browser_the_page_works_below_a_path(tmp_path):
    with running(below="/a/path", answer_tokens=8) as service, browsing(tmp_path) as view:
        view.open(f"{root(service)}a/path/")
        view.until("!byId('chat').hidden")
        ask(view)
        view.until(ENDED.format(3))
        assert all(view.js(TEXTS))
        assert view.errors == []


def test_the_folder_of_the_page_is_whole():
    folder = Path(str(importlib.resources.files("jaxsp.serve"))) / "html"
    assert sorted(file.name for file in folder.iterdir()) == ["chat.css", "chat.html.jinja", "chat.js"]
