"""Methods under one protocol: every cell trained alike, kept in one file, rendered as one page."""
