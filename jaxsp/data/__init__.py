"""From text to arrays: documents, chat texts, rows."""
