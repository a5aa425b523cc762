"""The place of the browser app, `tenuto.gradio_app`. This version has none yet."""
