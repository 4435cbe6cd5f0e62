"""Answers that σ is not sure of come after the whole document, and say so."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from typing import Any

import httpx
import openai
import pytest

from jaxsp.evaluation.certainty import ROOM, SIGNAL, certainty
from jaxsp.serve import server
from jaxsp.serve.app import CONTEXT_HEADER
from jaxsp.serve.brackets import NOTHING, Bracket, Brackets
from jaxsp.serve.fallback import Fallback
from jaxsp.serve.schema import read_chat
from jaxsp.serve.served import Shelf
from jaxsp.teacher.answers import answers_with_log_probs
from jaxsp.typing import UserError
from tests.serve.running import Running, asked, running, shelf, until
from tests.serve.test_load import request

TOKENS = 16
QUESTIONS = [f"What is fact {n}?" for n in range(12)]


@functools.cache
def answered() -> dict[str, tuple[list[int], list[float]]]:
    """σ's own answers: their tokens, and the logarithms of their probabilities."""
    served = shelf()["pump"]
    queries = [served.prompt.chat.query_ids(served.model.tokenizer, q) for q in QUESTIONS]
    found = answers_with_log_probs(served.model, served.prefix, queries, max_tokens=TOKENS)
    return {q: (ids, logs.tolist()) for q, ids, logs in zip(QUESTIONS, *found, strict=True)}


def ordered() -> list[str]:
    """The questions, the one that σ is least sure of first."""
    return sorted(QUESTIONS, key=lambda question: certainty(answered()[question][1]))


def calibrated(*certainties: float) -> Shelf:
    """The pump and the oven, with these certainties of held-out answers."""
    stored = {"signal": SIGNAL, "certainties": [*certainties], "wrong": [False] * len(certainties)}
    found = []
    for name in ("pump", "oven"):
        served = shelf()[name]
        manifest = {**served.prompt.manifest, "fallback": stored}
        found.append((served.folder, dataclasses.replace(served.prompt, manifest=manifest)))
    return server.open_shelf(shelf().model, found)


@pytest.fixture(scope="module")
def service():
    """Half of the questions are below the threshold."""
    values = [certainty(logs) for _, logs in answered().values()]
    with running(found=calibrated(*values), share=0.5) as found:
        yield found


def ask(service: Running, question: str, model: str = "pump", **options: Any) -> tuple[str, Any]:
    """The header of an answer, and the answer."""
    found = service.client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": question}], **{"max_tokens": TOKENS, **options}
    )
    return found.headers[CONTEXT_HEADER], found.parse()


def streamed(service: Running, question: str, model: str = "pump", **options: Any) -> tuple[str, list[Any]]:
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, **options}
    header, stream = ask(service, question, model, **options)
    return header, list(stream)


def text_of(chunks: list[Any]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def logs_of(chunks: list[Any]) -> list[Any]:
    chosen = [c.choices[0].logprobs for c in chunks if c.choices]
    return [one for logs in chosen if logs for one in logs.content]


def assert_same_tokens(ours: list[Any], theirs: list[Any]) -> None:
    """They have the same probabilities, too, but for the order of sums."""
    assert [one.token for one in ours] == [one.token for one in theirs]
    assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-4)


@pytest.mark.parametrize("question", ordered()[:2])
def test_an_unsure_answer_is_that_of_the_document(service, question):
    header, found = ask(service, question, logprobs=True, top_logprobs=2)
    full, expected = ask(service, question, "pump:document", logprobs=True, top_logprobs=2)
    assert (header, full) == ("full", "full")
    own, other = found.choices[0], expected.choices[0]
    assert own.message == other.message
    assert own.finish_reason == other.finish_reason
    assert_same_tokens(own.logprobs.content, other.logprobs.content)
    assert own.message.content != asked("pump", question, TOKENS)
    assert found.model == "pump"
    usage = found.usage.model_dump(exclude={"completion_tokens_details"})
    assert usage == expected.usage.model_dump(exclude={"completion_tokens_details"})
    assert usage["prompt_tokens_details"]["context"] == "full"
    ids, logs = answered()[question]
    discarded = found.usage.completion_tokens_details.discarded_tokens
    first = next(i for i, log in enumerate(logs) if log < threshold(service))
    assert first < discarded <= min(len(ids), first + 8)  # until the next look
    assert expected.usage.completion_tokens_details is None


@pytest.mark.parametrize("question", ordered()[-2:])
def test_a_sure_answer_is_its_own(service, question):
    header, found = ask(service, question, logprobs=True, top_logprobs=2)
    assert (header, found.choices[0].message.content) == ("sigma", asked("pump", question, TOKENS))
    assert found.usage.prompt_tokens_details.context == "sigma"
    assert found.usage.completion_tokens_details is None
    assert len(found.choices[0].logprobs.content) == len(answered()[question][0])
    assert ask(service, question)[1].choices[0].logprobs is None


def threshold(service: Running) -> float:
    found = service.fallback
    assert found is not None
    wish = read_chat({"model": "pump", "messages": [{"role": "user", "content": "a"}]})
    least = found.least(shelf()["pump"], wish, 1)
    assert least is not None
    return least


def test_half_of_the_questions_go_to_the_document(service):
    headers = [ask(service, question)[0] for question in ordered()]
    assert headers == ["full"] * 6 + ["sigma"] * 6


def test_a_stream_never_changes_and_ends_as_the_answer_does(service):
    unsure, sure = ordered()[0], ordered()[-1]
    for question, model, context in ((unsure, "pump:document", "full"), (sure, "pump", "sigma")):
        header, chunks = streamed(service, question)
        whole = ask(service, question, model, logprobs=True)[1]
        assert header == context
        assert text_of(chunks) == whole.choices[0].message.content
        assert_same_tokens(logs_of(chunks), whole.choices[0].logprobs.content)
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage.prompt_tokens_details == whole.usage.prompt_tokens_details
        pieces = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
        assert (len(pieces) == 1) == (context == "sigma")  # held back until it is judged


def test_who_names_the_context_gets_it(service):
    question = ordered()[0]
    for model, context in (("pump:document", "full"), ("oven@2", "sigma")):
        assert ask(service, question, model)[0] == context
    assert Bracket("pump:nothing", NOTHING, shelf()["pump"]).unread.context == "none"
    assert ask(service, question, "oven@2")[1].choices[0].message.content == asked("oven@2", question, TOKENS)
    ids = shelf()["pump"].prompt.chat.query_ids(shelf().model.tokenizer, question)
    found = service.client.completions.with_raw_response.create(model="pump", prompt=ids)
    assert found.headers[CONTEXT_HEADER] == "sigma"  # completions are not judged


def test_samples_are_judged_by_the_most_probable_tokens():
    """The first one's probability is the same whatever is drawn, and of most tokens that is less."""
    question = QUESTIONS[0]
    first = answered()[question][1][0]
    with running(found=calibrated(first - 1e-3), share=0.5) as service:
        headers = [ask(service, question, temperature=2.0, seed=n, max_tokens=1)[0] for n in range(5)]
    assert headers == ["sigma"] * 5
    with running(found=calibrated(first + 1e-3), share=0.5) as service:
        headers = [ask(service, question, temperature=2.0, seed=n, max_tokens=1)[0] for n in range(5)]
    assert headers == ["full"] * 5


def test_what_a_stop_text_leaves_out_is_not_judged():
    """An answer whose least sure token comes after the stop."""
    texts = {question: asked("pump", question, TOKENS) for question in QUESTIONS}
    question, whole = next(
        (question, text)
        for question, text in texts.items()
        if min(answered()[question][1][:4]) > min(answered()[question][1]) and text.isprintable()
    )
    (ids, logs), stop = answered()[question], whole[1:3]
    tokenizer: Any = shelf().model.tokenizer
    end = next(n for n in range(1, TOKENS) if stop in tokenizer.decode(ids[:n]))
    assert min(logs[:end]) > min(logs)
    with running(found=calibrated(min(logs[:end]), min(logs)), share=0.5) as service:
        assert ask(service, question)[0] == "full"
        header, found = ask(service, question, stop=stop)
        assert (header, found.choices[0].message.content) == ("sigma", whole[: whole.index(stop)])


def test_a_chat_for_which_the_document_leaves_no_room_is_not_judged():
    found = calibrated(-0.2, -0.1)
    served, fallback = found["pump"], Fallback(found, 0.5)
    wish = read_chat({"model": "pump", "messages": [{"role": "user", "content": "a"}]})
    manifest = served.prompt.manifest
    room = 512 - len(manifest["slots"]["before_ids"]) - manifest["context_tokens"]
    assert fallback.least(served, wish, room - ROOM) == pytest.approx(-0.15)
    assert fallback.least(served, wish, room - ROOM + 1) is None
    short = dataclasses.replace(wish, max_tokens=3)
    assert fallback.least(served, short, room - 3) == pytest.approx(-0.15)
    assert fallback.least(served, short, room - 2) is None
    assert fallback.least(found["oven@2"], wish, 5) is None
    assert fallback.least(found["oven@4"], wish, 5) == fallback.least(found["oven"], wish, 5) is not None


def test_a_prompt_without_calibration_or_document_is_named():
    with pytest.raises(UserError, match="--context-fallback, pump: The prompt does not say when it is not"):
        Fallback(shelf(), 0.1)
    found = calibrated(-1.0)
    gone = dataclasses.replace(found["oven"].prompt, context=None)
    both = [(found["pump"].folder, found["pump"].prompt), (found["oven"].folder, gone)]
    with pytest.raises(UserError, match=r"--context-fallback, oven: The document is not in the soft"):
        Fallback(server.open_shelf(found.model, both), 0.1)


def test_a_client_that_leaves_while_it_is_judged_frees_its_slot(slowly):
    body = {"model": "pump", "max_tokens": 64, "messages": [{"role": "user", "content": QUESTIONS[0]}]}
    with running(found=calibrated(-99.0, -98.0), share=0.5) as service:
        for stream in (True, False):
            connection = request(service, {**body, "stream": stream})
            assert until(lambda: service.scheduler._rows)
            start = time.monotonic()
            connection.close()
            assert until(lambda: service.scheduler.count == 0)
            assert time.monotonic() - start < 1.5
        assert httpx.get(f"{service.url}/models").status_code == 200


def test_the_time_of_both_answers_is_one(monkeypatch):
    """An answer after a document that was long to read would come, but too late."""
    opened = Brackets.open

    async def slow(self, bracket, encoder):
        await asyncio.sleep(1.2)
        return await opened(self, bracket, encoder)

    monkeypatch.setattr(Brackets, "open", slow)
    with running(found=calibrated(-0.002, -0.001), share=0.5, seconds=1) as service:
        with pytest.raises(openai.InternalServerError, match="took more than 1 s") as late:
            ask(service, QUESTIONS[0], max_tokens=1)
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        assert service.scheduler.count == 0
