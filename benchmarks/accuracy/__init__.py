"""Compares methods under one protocol, with results in one file, rendered as one page."""
