"""The place of the WebUI extension (Python 3.10). This version has none yet."""
