"""The queries of a document alone, to look at: kept for the next time."""

from __future__ import annotations

from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.settings import Settings
from jaxsp.study.questions import Study, study, study_key
from jaxsp.teacher.store import Store, about


def study_alone(
    model: LanguageModel, context: str, settings: Settings, display: Display, store: Store
) -> Study:
    """The queries of a document alone, none of them held out; where the store has them they are read.

    Who is interrupted goes on from the texts and answers that are there.

    Args:
      model: as in ``study``, and so are the others.
      context: the document.
      settings: settings of a compression.
      display: shows what goes on.
      store: where they are kept for the next time.

    Raises:
      UserError: as in ``study``.
    """
    key = f"{study_key(model, context, [], [], settings)}.questions"
    if (kept := store.read(key, Study.read, "Questions from the document")) is not None:
        return kept
    asked = model, context, [], [], settings, display
    found, _ = study(*asked, measure=False, kept=store.begun(key))
    store.write(key, about("questions", model.name, context, len(found.train)), found.write, Study.read)
    store.remove_begun(key)
    return found
