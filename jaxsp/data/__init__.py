"""From text to arrays: documents, chat slots, rows."""
