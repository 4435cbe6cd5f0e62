"""`jaxsp serve`: saved prompts behind OpenAI's HTTP interface, and a page to chat with them.

A soft prompt is a model there: its name is that of its folder, and ``name@length`` is one of the shorter
prompts that a nested one holds. All share one frozen model, in one running batch.

What a request means:

- σ stands in the first user message, where the document stood in training. A chat begins with a user message
  and ends with one; messages of one role that follow each other are one, with an empty line between them.
- The system turn is a part of the prompt, and stays. A system (or developer) text that is this turn's own, or
  the document itself, is left out; any other stands in front of the next user message.
- Control tokens in messages are plain text. A content may be a list of text parts, which are lines.
- A user message may not be empty; an assistant's may.
- ``/v1/completions`` goes on with a text right behind σ, without the turns of a chat.
- The default temperature is 0: the answer of `jaxsp ask`. Samples depend on the request and its seed, not on
  what else is answered at the time.
- ``max_tokens`` beyond what the server or the model's window leaves ends the answer there, by ``length``.
- ``logprobs`` are of the model's whole softmax, before temperature and ``top_p``.
- ``usage`` counts what the model reads: the text around σ, its slots and the messages. Its details say how
  many of these are read once for all requests (``cached_tokens``), and how many more the document has than σ
  has slots (``saved_tokens``).
- ``name:document`` and ``name:nothing`` answer as the model does after the whole document, and after nothing:
  what σ stands between. The page at ``/`` asks them beside σ; so may any client. ``/v1/models`` does not list
  them, but gives each by its name. Each is read at its first request, into a batch of its own; at most two
  documents are kept. There is no ``name:document`` if the folder has no context.txt, or the window no room.
- Each answer says what it was read after: the header ``x-jaxsp-context`` and ``context`` in the details of
  ``usage`` are ``sigma``, ``full`` (the whole document) or ``none``.
- With ``--context-fallback 0.1`` a chat whose answer σ is not sure of is answered as ``name:document`` does,
  and says ``full``. σ's certainty is the probability of the least probable token of its answer; the limit is
  the one below which a tenth of the held-out queries lie, by the calibration in the prompt's manifest: of
  other chats like these, with answers as long, about a tenth go to the document. An answer is held back
  until it is judged, so that it never changes: one that is sure comes in one piece when σ has ended, also in
  a stream; one that is not is given up at its first unsure token, and the document's comes as usual.
  ``usage`` is then the document's, and ``discarded_tokens`` those of σ's answer. Completions are never
  judged, nor chats for which there is no room behind the document, nor the shorter prompts of a nested one:
  σ answers. Where the document can't be read now, the request is refused (429 or 503), as one for
  ``name:document`` is.
- The page itself is the same for everybody, and needs no key: it asks for one. What it then shows comes as
  JSON (``/page/prompts``). It may stand at any path behind a proxy.
- A field that would change the answer, and can't be served, is refused by name; one that only describes the
  request (``user``, ``metadata``) is not used.
"""
