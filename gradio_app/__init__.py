"""The browser app, `tenuto.gradio_app`: views of the library, in Gradio. `tenuto app` starts it.

`app` puts it together; a tab is a file. What takes long runs in a process of its own (`jobs`,
`worker`). No module is loaded here, so that the worker needs no Gradio.
"""
