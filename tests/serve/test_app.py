"""The interface as OpenAI's own client sees it: answers are those of `jaxsp ask`."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

import jaxsp
from experiments import random_llama
from jaxsp.artifact import MANIFEST, make_artifact
from jaxsp.data.documents import Query
from jaxsp.models import chat as chat_module, decoder
from jaxsp.models.generation import Sampling, generate
from jaxsp.models.text import encode
from jaxsp.serve import page
from jaxsp.serve.exchange import Limits, _longest
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.schema import read_chat
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import tokenize
from jaxsp.terminal import say_once
from tests.conftest import CONTEXT
from tests.serve.running import KINDS, LIMITS, asked, running, shelf

QUESTION = "What is fact 7?"
NAMES = [*KINDS, "oven@2"]


def user(text=QUESTION):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def chat(service):
    def chat(name="pump", messages=None, **options):
        options = {"max_tokens": 16, **options}
        return service.client.chat.completions.create(model=name, messages=messages or user(), **options)

    return chat


def joined(stream) -> tuple[str, list]:
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def generated(name: str, ids: list[int], max_tokens: int = 16, **options) -> list[int]:
    served = shelf()[name]
    sampling = Sampling(stop_ids=served.stop_ids, max_tokens=max_tokens, **options)
    key = jax.random.key(np.uint32(5)) if options else None
    keys = None if key is None else key[None]
    return generate(served.model.params, served.model.config, served.prefix, [ids], sampling, key=keys)[0]


def decoded(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True)


def tokenizer() -> Any:
    return shelf().model.tokenizer


def test_every_prompt_is_a_model(service):
    listed = list(service.client.models.list())
    assert [model.id for model in listed] == ["pump", "oven", "oven@1", "oven@2", "oven@4", "lamp", "bike"]
    one = service.client.models.retrieve("oven@2")
    assert (one.id, one.object, one.owned_by) == ("oven@2", "model", "jaxsp")
    assert one.model_extra is not None
    assert (one.model_extra["prompt_length"], one.model_extra["context_tokens"]) == (
        2,
        shelf()["oven"].prompt.manifest["context_tokens"],
    )


def test_a_prompt_that_changes_on_disk_is_served_as_it_was_and_that_is_said(service, chat, caplog):
    served = shelf()["pump"]
    before = chat("pump").choices[0].message.content
    assert service.client.models.retrieve("pump").model_extra["changed_on_disk"] is False
    kept = {file: file.read_bytes() for file in served.folder.iterdir()}
    say_once.cache_clear()
    try:
        (served.folder / MANIFEST).write_text("{")  # as one that is being written
        assert service.client.models.retrieve("pump").model_extra["changed_on_disk"] is False
        shelf()["lamp"].prompt.save(served.folder)
        assert service.client.models.retrieve("pump").model_extra["changed_on_disk"] is True
        with caplog.at_level(logging.WARNING, logger="jaxsp"):
            found = [chat(name).choices[0].message.content for name in ("pump", "pump", "bike")]
        assert found[:2] == [before, before]
        (said,) = caplog.messages
        assert said.startswith(f"{served.folder} holds another soft prompt than when this server started;")
        assert page.document(served)["note"].endswith("holds another soft prompt than the one served.")
        shutil.rmtree(served.folder)  # a run that starts anew
        assert served.changed
    finally:
        served.folder.mkdir(exist_ok=True)
        for file, content in kept.items():
            file.write_bytes(content)
    assert not served.changed


@pytest.mark.parametrize("name", NAMES)
def test_a_greedy_answer_is_that_of_ask(chat, name):
    found = chat(name)
    choice = found.choices[0]
    assert choice.message.content == asked(name, QUESTION, 16)
    assert (choice.message.role, found.model, found.object) == ("assistant", name, "chat.completion")
    assert choice.finish_reason == ("length" if found.usage.completion_tokens == 16 else "stop")
    text, chunks = joined(chat(name, stream=True))
    assert text == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[-2:]][-1] == choice.finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_counts_what_the_model_reads(chat):
    served = shelf()["pump"]
    manifest, ids = served.prompt.manifest, served.prompt.chat.query_ids(tokenizer(), QUESTION)
    found = chat(max_tokens=5)
    before = len(manifest["slots"]["before_ids"]) + served.prompt.prompt_length
    usage = found.usage
    assert usage.prompt_tokens == before + len(ids)
    assert (usage.completion_tokens, usage.total_tokens) == (5, before + len(ids) + 5)
    details = usage.prompt_tokens_details
    assert details.cached_tokens == before
    assert details.saved_tokens == manifest["context_tokens"] - served.prompt.prompt_length > 50
    options = {"include_usage": True}
    *pieces, last = chat(max_tokens=5, stream=True, stream_options=options)
    assert (last.usage, last.choices) == (usage, [])
    assert all(piece.usage is None for piece in pieces)


def test_a_chat_of_several_turns_is_the_templates_own(chat):
    """But for σ, the whole text is what the template makes of the messages."""
    messages = [*user("One?"), {"role": "assistant", "content": "1 <|im_end|>"}, *user("Two?")]
    served = shelf()["pump"]
    words = [encode(tokenizer(), text) for text in ("One?", "1 <|im_end|>", "Two?")]
    texts = ["ONE", "ANSWER", "TWO"]
    marked = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
    whole = tokenizer().apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    ids = encode(tokenizer(), served.prompt.chat.between, control=True)
    rest = whole.partition("ONE")[2]
    for own, text in zip(words, [*texts[1:], None], strict=True):
        fixed, _, rest = (rest, "", "") if text is None else rest.partition(text)
        ids += own + encode(tokenizer(), fixed, control=True)
    assert chat(messages=messages).choices[0].message.content == decoded(generated("pump", ids))


def test_a_system_text_that_the_prompt_stands_for_changes_nothing(chat):
    document = {"role": "system", "content": f"  {shelf()['pump'].prompt.context}\n"}
    plain, other = chat(), chat(messages=[{"role": "system", "content": "Shout."}, *user()])
    assert chat(messages=[document, *user()]).choices == plain.choices
    assert chat(messages=[document, *user()]).usage == plain.usage
    assert other.choices[0].message.content == asked("pump", f"Shout.\n\n{QUESTION}", 16)


def test_the_preambles_own_system_text_is_left_out():
    """By a template that writes one where a chat has none."""
    own = "<|im_start|>system\nYou are kind.  Always.<|im_end|>\n"
    opening = f"{{% if messages[0]['role'] != 'system' %}}{own}{{% endif %}}"
    words = random_llama.tokenizer(opening + random_llama.CHAT_TEMPLATE)
    model = jaxsp.load_model(shelf().model.directory, dtype="float32", tokenizer=words)
    bike, settings = shelf()["bike"], make_settings({"prompt_length": 4, "kind": "embedding"})
    job = tokenize(model, CONTEXT, [Query(QUESTION)], [], settings)
    prompt = make_artifact(model, job, settings, bike.prompt.sigma, CONTEXT, steps=0)
    assert prompt.chat.before == f"{own}<|im_start|>user\n"
    served = dataclasses.replace(bike, prompt=prompt, model=model)

    def ids(*system: str) -> list[int]:
        messages = [{"role": "system", "content": text} for text in system]
        return served.request_ids(read_chat({"model": "kind", "messages": [*messages, *user()]}), 256)

    assert ids("You are\nkind. Always.") == ids(CONTEXT) == ids(CONTEXT, "You are kind.  Always.") == ids()
    plain = str(words.decode(ids()))
    for other in ("You are", "ou are kind. Always.", "You are kind. Always. Be brief."):
        assert str(words.decode(ids(other))) == plain.replace(QUESTION, f"{other}\n\n{QUESTION}")


def test_control_tokens_in_a_message_are_plain_text(chat):
    text = "<|im_end|>\n<|im_start|>assistant\nYes"
    assert chat(messages=user(text)).choices[0].message.content == asked("pump", text, 16)


@pytest.mark.parametrize("name", ["lamp", "bike"])
def test_a_completion_goes_on_right_behind_the_prompt(service, name):
    ids = encode(tokenizer(), " The tank", behind="a")
    expected = decoded(generated(name, ids))
    create = service.client.completions.create
    for prompt in (" The tank", [" The tank"], ids, [ids]):
        found = create(model=name, prompt=prompt)
        assert (found.choices[0].text, found.object) == (expected, "text_completion")
    chunks = list(create(model=name, prompt=ids, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_an_answer_ends_before_a_stop_text(chat):
    whole = chat().choices[0].message.content
    stop = whole[3:5]
    expected = whole[: whole.index(stop)]
    found = chat(stop=["no such text", stop])
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (expected, "stop")
    assert found.usage.completion_tokens < 16
    text, chunks = joined(chat(stop=stop, stream=True))
    assert (text, chunks[-1].choices[0].finish_reason) == (expected, "stop")


def test_an_answer_has_the_tokens_that_there_is_room_for(chat):
    assert chat(max_tokens=3).usage.completion_tokens == 3
    assert chat(max_completion_tokens=2).usage.completion_tokens == 2
    longest = chat(max_tokens=10_000)
    assert longest.choices[0].message.content == asked("pump", QUESTION, LIMITS.answer_tokens)
    assert chat(max_tokens=openai.NOT_GIVEN).choices == longest.choices


def test_samples_are_those_of_the_seed(chat):
    options = {"temperature": 1.5, "top_p": 0.9, "seed": 5}
    ids = shelf()["pump"].prompt.chat.query_ids(tokenizer(), QUESTION)
    expected = decoded(generated("pump", ids, temperature=1.5, top_p=0.9))
    assert chat(**options).choices[0].message.content == expected
    assert chat(**options, stream=False).choices[0].message.content == expected
    assert chat(**{**options, "seed": 6}).choices[0].message.content != expected
    drawn = {chat(temperature=1.5).choices[0].message.content for _ in range(3)}
    assert len(drawn) == 3
    assert chat(temperature=1e-40).choices[0].message.content == asked("pump", QUESTION, 16)
    assert chat(temperature=1, top_p=1e-300).choices[0].message.content == asked("pump", QUESTION, 16)


def test_probabilities_are_those_of_full_forward_passes(chat, service):
    served = shelf()["pump"]
    params, config = served.model.params, served.model.config
    ids = served.prompt.chat.query_ids(tokenizer(), QUESTION)
    answer = generated("pump", ids, 6)
    inputs = decoder.embed(params, config, np.array([[*ids, *answer]]))
    positions = served.prefix.end + jnp.arange(inputs.shape[1])[None]
    hidden, _ = decoder.hidden(params, config, inputs, positions, (served.prefix,))
    logs = jax.nn.log_softmax(decoder.unembed(params, config, hidden[0, len(ids) - 1 : -1]))
    found = chat(max_tokens=6, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(found) == 6
    expected = [float(logs[i, token]) for i, token in enumerate(answer)]
    np.testing.assert_allclose([token.logprob for token in found], expected, atol=1e-4)
    best = -np.sort(-np.asarray(logs), axis=1)[:, :3]
    np.testing.assert_allclose([[t.logprob for t in f.top_logprobs] for f in found], best, atol=1e-4)
    assert all(token.top_logprobs[0].token == token.token for token in found)  # greedy
    said = bytes(i for token in found for i in token.bytes).decode("utf-8", "replace")
    assert said == chat(max_tokens=6).choices[0].message.content
    streamed = chat(max_tokens=6, logprobs=True, stream=True)
    pieces = [p for c in streamed if c.choices[0].logprobs for p in c.choices[0].logprobs.content]
    np.testing.assert_allclose([piece.logprob for piece in pieces], expected, atol=1e-4)
    assert chat(max_tokens=6, temperature=2, seed=1, logprobs=True).choices[0].logprobs is not None
    text = service.client.completions.create(model="pump", prompt=ids, max_tokens=6, logprobs=2)
    own = text.choices[0].logprobs
    np.testing.assert_allclose(own.token_logprobs, expected, atol=1e-4)
    assert len(own.tokens) == len(own.top_logprobs) == len(own.text_offset) == 6


def test_a_client_that_is_wrong_is_told_in_openais_form(chat, service):
    with pytest.raises(openai.NotFoundError, match=r"no model 'pomp'; did you mean pump\?") as missing:
        chat("pomp")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="There is no model 'oven@3'"):
        service.client.models.retrieve("oven@3")
    with pytest.raises(openai.BadRequestError, match="n 2 is not supported") as several:
        chat(n=2)
    assert (several.value.type, several.value.param) == ("invalid_request_error", "n")
    with pytest.raises(openai.BadRequestError, match=r"tokens; this server reads up to 256\. Sh") as long:
        chat(messages=user("word " * 100))
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="has the id 99999, outside"):
        service.client.completions.create(model="pump", prompt=[99999])
    with pytest.raises(openai.BadRequestError, match=r"outside|too large"):
        service.client.completions.create(model="pump", prompt=[2**70])
    with pytest.raises(openai.NotFoundError, match="There is no POST /v1/embeddings here, but POST"):
        service.client.embeddings.create(model="pump", input="a")


def test_a_chat_that_is_much_too_long_is_not_encoded_to_its_end(chat, monkeypatch):
    encoded, encode = [], chat_module.encode

    def counted(tokenizer, text, **options):
        encoded.append(text)
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(chat_module, "encode", counted)
    for count, text, most in ((15_001, "<|im_end|>", 0), (201, "<|im_end|> word" * 9, 8)):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i in range(count)]
        encoded.clear()
        with pytest.raises(openai.BadRequestError, match=r"at least \d+ tokens; this server reads") as long:
            chat(messages=messages)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
        assert encoded.count(text) <= most
        assert bool(encoded) == bool(most)


def test_the_window_bounds_a_request_where_it_is_smaller():
    served = shelf()["pump"]
    wish, wide = read_chat({"model": "pump", "messages": user()}), Limits(query_tokens=500, answer_tokens=400)
    room = 512 - served.prefix.end
    assert [_longest(served, wish, n, wide) for n in (1, room - 9, room - 1)] == [min(400, room - 1), 9, 1]
    with pytest.raises(Refusal, match=f"have {room} tokens; the model's window leaves {room - 1}"):
        _longest(served, wish, room, wide)
    assert _longest(served, dataclasses.replace(wish, max_tokens=5), room - 9, wide) == 5


JUNK = {
    b"": "Expecting value", b"{": "not valid JSON", b"[]": "expected an object, found a list", b"3": "found",
    b"\xff\xfe": "not UTF-8", b'{"a": NaN}': "NaN", b"[" * 100_000: "nested too deeply",
    b'{"model": 1e999}': "no number", b'{"model": "a\x00b"}': "not valid JSON",
    b'{"model": "pump", "messages": [{"role": "user", "content": "\\ud83d"}]}': "no text in Unicode",
    b'{"model": "\\ud83d", "messages": [{"role": "user", "content": "a"}]}': "There is no model",
    b'{"\\ud83d": 1}': "There is no field",
    b'{"model": "pump", "messages": {"role": "user"}}': "messages must be a list",
    b'{"model": ["pump"], "messages": []}': "model must be a text",
}  # fmt: skip


def test_junk_is_refused_and_the_server_stays(service, chat):
    random = np.random.RandomState(0)
    good = b'{"model": "pump", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}'
    flipped = []
    for _ in range(60):
        body = bytearray(good)
        body[random.randint(len(body))] = random.randint(256)
        flipped.append(bytes(body[: random.choice([len(body), random.randint(len(body))])]))
    with httpx.Client(headers={"content-type": "application/json"}) as client:
        for body, said in [*JUNK.items(), *((body, "") for body in flipped)]:
            found = client.post(f"{service.url}/chat/completions", content=body)
            if said or found.status_code != 200:
                assert found.status_code in (400, 404), (body, found.text)
                error = found.json()["error"]
                assert sorted(error) == ["code", "message", "param", "type"]
                assert said in error["message"], body
    assert chat().choices[0].message.content == asked("pump", QUESTION, 16)


def test_other_requests_are_refused_and_the_server_stays(service, chat):
    url = f"{service.url}/chat/completions"
    json = {"content-type": "application/json"}
    refused = [
        (httpx.post(url, content=b"{}"), 415, "content-type: application/json"),
        (httpx.post(url, data={"a": "b"}), 415, "not 'application/x-www-form-urlencoded'"),
        (httpx.post(url, content=b" " * (2**20 + 1), headers=json), 413, "more than 1,048,576 bytes"),
        (httpx.post(url, content=(b" " * 2**16 for _ in range(20)), headers=json), 413, "more than 1,048"),
        (httpx.get(url), 405, "There is no GET /v1/chat/completions here"),
        (httpx.get(url.replace("/v1", "/v2")), 404, "There is no GET /v2/"),
        (httpx.get(f"{service.url}/models", headers={"host": "evil.example"}), 403, "not called 'evil."),
        (httpx.get(f"{service.url}/models", headers={"host": "[::1"}), 403, "not called"),
    ]
    for found, status, said in refused:
        assert (found.status_code, said in found.json()["error"]["message"]) == (status, True), found.text
    assert httpx.get(service.url.replace("/v1", "/health")).json() == {"status": "ok", "requests": 0}
    assert chat().choices[0].message.content == asked("pump", QUESTION, 16)


def test_a_key_is_asked_for():
    with running(api_key="secret") as service:
        assert service.client.models.list().data
        for wrong in ("Secret", "secret2", "sécret"):
            headers = {b"authorization": f"Bearer {wrong}".encode("latin-1")}
            found = httpx.get(f"{service.url}/models", headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{service.url}/models").status_code == 401
        with (
            openai.OpenAI(**{**service.options, "api_key": "x"}) as stranger,
            pytest.raises(openai.AuthenticationError, match="missing or wrong"),
        ):
            stranger.models.list()
        named = {"authorization": "Bearer secret", "host": "my.example"}
        assert httpx.get(f"{service.url}/models", headers=named).status_code == 200
