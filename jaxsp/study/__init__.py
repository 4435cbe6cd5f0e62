"""Queries that a document itself gives, so that nobody has to think of questions.

Seeds (one file each in ``seeds``) draft queries about the pieces of a document (``text``). The model writes
those that are only begun (``writing``) and answers all with the document before it. Queries that the document
doesn't matter to are left out (``filters``). Of the others some are chosen (``choice``) for each sentence
(``coverage``). Beside the queries of a user it is those that need no writing, of sentences that none of these
asks for, unless the user wishes for more. ``questions`` conducts.
"""

from jaxsp.study.alone import study_alone as study_alone
from jaxsp.study.questions import (
    NothingFit as NothingFit,
    Study as Study,
    only_fills as only_fills,
    study as study,
    study_key as study_key,
)
